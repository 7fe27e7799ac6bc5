"""Shapes of published models."""

from __future__ import annotations

LLAMA_7B = {
    "family": "llama",
    "layers": 32,
    "hidden": 4096,
    "intermediate": 11008,
    "heads": 32,
    "kv_heads": 32,
    "head_dim": 128,
    "vocabulary": 32000,
    "tied_embeddings": False,
}
LLAMA_13B = LLAMA_7B | {"layers": 40, "hidden": 5120, "intermediate": 13824, "heads": 40, "kv_heads": 40}
MISTRAL_7B = LLAMA_7B | {"family": "mistral", "intermediate": 14336, "kv_heads": 8}
LLAMA_70B = LLAMA_7B | {"layers": 80, "hidden": 8192, "intermediate": 28672, "heads": 64, "kv_heads": 8}
MIXTRAL_8X7B = MISTRAL_7B | {"family": "mixtral", "experts": 8, "experts_per_token": 2}
QWEN3_30B_A3B = {
    "family": "qwen3_moe",
    "layers": 48,
    "hidden": 2048,
    "intermediate": 768,
    "heads": 32,
    "kv_heads": 4,
    "head_dim": 128,
    "vocabulary": 151936,
    "tied_embeddings": False,
    "experts": 128,
    "experts_per_token": 8,
}
