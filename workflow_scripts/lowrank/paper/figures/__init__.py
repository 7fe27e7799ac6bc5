"""Figures of the study. They use matplotlib without a display.

One module a kind of figure, with a function that makes the frame (which is also the CSV) and one that draws it;
`style` is how all of them look, `panels` how they are laid out, `axes` what they do with perplexities, `values`
where these come from.
"""
