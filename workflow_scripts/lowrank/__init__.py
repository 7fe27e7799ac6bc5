"""rankwise: low-rank compression of language models, as a library that the workflow's stages call."""

__version__ = "0.1.0"
