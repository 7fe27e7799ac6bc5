"""How much rank each matrix gets: the Bayesian search, its space and objective, and allocations that need no search.

Imported by compression and methods.
"""
