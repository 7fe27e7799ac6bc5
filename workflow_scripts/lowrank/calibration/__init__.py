"""From texts to windows of tokens, and from these to the moments of inputs and of loss gradients.

Imported by what reads the statistics: bases, search, compression, methods, evaluation (for its windows).
"""
