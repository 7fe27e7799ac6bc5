"""What leaves the house: checkpoints in forms that other tools read, without code of ours.

`wish` is what `make export` asks for, and `share` does it; `blocks` multiplies layers out, `dense` and `gguf` write
them.
"""
