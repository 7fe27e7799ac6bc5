"""Names that transformers had before version 5 for what config.json says: older readers of it look for no others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def older_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that a reader of transformers 4 needs beside those of version 5.

    One that finds no `rope_theta` takes 10,000 without a word, and writes nonsense.

    Args:
        config: of config.json.
    """
    names: dict[str, Any] = {"torch_dtype": config["dtype"]} if "dtype" in config else {}
    rope = config.get("rope_parameters")
    if not rope:
        return names
    if "full_attention" in rope:  # Gemma 3: one rotation for global blocks, one for those of a window
        names["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    names["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        names["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return names | {"rope_scaling": _scaling(rope)}


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind == "longrope":  # Phi-3 and 4: their class refused any other key, and this name of the kind
        return {"type": kind, "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    return {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
