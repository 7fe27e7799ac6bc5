"""config.json has the names that transformers had before version 5, and is read by version 5 as without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from lowrank.model.checkpoint import replace_modules, save_checkpoint
from lowrank.model.factors import LowRankFactors
from lowrank.model.older_names import older_names
from tests.unit.model.test_families import SAMPLES, a_model

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def without_old_kind(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The rotation; `type`, which was the name of `rope_type`, stays where it was read."""
    rope = getattr(config, "rope_parameters", None)
    return rope and {key: value for key, value in rope.items() if key != "type"}


@pytest.mark.parametrize(
    ("name", "theta", "scaling"),
    [
        ("llama", 10_000.0, None),
        ("llama with scaled rotations", 100.0, LLAMA3 | {"original_max_position_embeddings": 16}),
        # Its class in version 4 refused any other key.
        (
            "phi3 with rotations for long texts",
            100.0,
            {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [3.0] * 6},
        ),
    ],
)
def test_a_compressed_checkpoint_has_the_rotation_for_readers_of_before(
    name: str, theta: float, scaling: dict[str, object] | None, tmp_path: Path
) -> None:
    model = a_model(name)
    layer = "model.layers.0.mlp.down_proj"
    rows, columns = model.get_submodule(layer).weight.shape
    replace_modules(model, {layer: LowRankFactors(torch.ones(4, columns), torch.ones(rows, 4), None)})
    save_checkpoint(model, tmp_path / "nowhere", tmp_path / "checkpoint")
    written = json.loads((tmp_path / "checkpoint/config.json").read_text())
    assert (written["rope_theta"], written["rope_scaling"]) == (theta, scaling)
    assert written["torch_dtype"] == written["dtype"] == "float32"
    read = AutoConfig.from_pretrained(tmp_path / "checkpoint", trust_remote_code=False)
    assert without_old_kind(read) == model.config.rope_parameters


@pytest.mark.parametrize("name", SAMPLES)
def test_version_5_reads_the_same_rotation(name: str, tmp_path: Path) -> None:
    config = a_model(name).config
    config.dtype = torch.bfloat16
    plain = json.loads(config.to_json_string())
    (tmp_path / "config.json").write_text(json.dumps(plain | older_names(plain)))
    read = AutoConfig.from_pretrained(tmp_path)
    assert without_old_kind(read) == getattr(config, "rope_parameters", None)
    assert read.dtype == torch.bfloat16
