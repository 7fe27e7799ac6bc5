"""From a method's answer to a smaller model, and what methods share: pruning, rotation, refitting, rank searches.

Imported by methods alone, but for `branches` and `structured`, which `export` reads too.
"""
