"""The arithmetic of ranks: what one costs, which ratio it keeps, how it is rounded, which loss it is predicted to cost.

From shapes and curves alone, without a model and without torch; imported by all that count parameters.
"""
