"""What leaves the house: checkpoints in forms that other tools read, without code of ours.

`blocks` multiplies layers out, `dense` and `gguf` write them, `share` does what `make export` asks for.
"""
