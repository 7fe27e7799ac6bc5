"""From statistics to bases: principal directions, Fisher-weighted ones, and weighted decompositions.

Imported by search, compression and methods.
"""
