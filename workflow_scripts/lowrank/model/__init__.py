"""A model as it stands: its family and linear layers, its checkpoint, what a layer is replaced by, and its losses.

Knows nothing of studies or jobs; every room above may import it.
"""
