"""Compression as its rule runs it: the manifest has what the method says of its result."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import torch

from lowrank.compression.given_up import KEPT, give_up
from lowrank.files import save_tensors
from lowrank.model.checkpoint import load_checkpoint
from tests import tiny
from tests.unit.methods import rankwise_samples as samples
from tests.unit.model.factor_samples import TOKENS
from tests.unit.search.test_search_stage import Named

STAGE = Path(__file__).parents[3] / "workflow_scripts/stages/compress_model.py"
KIND = "llama-gqa"


def run(
    folder: Path, method: dict[str, Any], licence: str = "Apache-2.0", dtype: str = "float32", **inputs: str
) -> dict[str, Any]:
    """Run the stage on a tiny model, which is stored in float32; returns the manifest."""
    tiny.model(KIND).save_pretrained(folder / "base/model")
    tiny.tokenizer().save_pretrained(folder / "base/model")
    output = Named(checkpoint=str(folder / "checkpoint"), manifest=str(folder / "manifest.json"))
    subject = {"model": "tiny", "method": "m", "ratio": 30, "tuning": "none", "seed": 0}
    settings = {"method": method, "dtype": dtype, "shape": tiny.shape(KIND), "subject": subject, "covariance": None}
    settings |= {"state": str(folder / "state")}
    job = Named(
        **{"rule": "compress_model", "threads": 1, "log": [], "resources": {}, "output": output},
        input=Named(model=str(folder / "base/model"), **inputs),
        wildcards=Named(model="tiny", method="m", ratio="30", seed="0"),
        params=Named(settings=settings, base={"source": {"path": "/somewhere"}, "license": licence}),
    )
    runpy.run_path(str(STAGE), init_globals={"snakemake": job})
    manifest: dict[str, Any] = json.loads(Path(output.manifest).read_text())
    return manifest


def size_of(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


def test_the_manifest_has_the_predicted_rise_of_the_loss_and_what_it_is(tmp_path: Path) -> None:
    bases = str(samples.fisher_bases(KIND).files[0].parent)
    save_tensors(tmp_path / "tokens.safetensors", {"tokens": TOKENS.int()})
    method = {"kind": "rankwise", "calibration": "c", "covariance": "c"}
    found = run(tmp_path, method, bases=bases, tokens=str(tmp_path / "tokens.safetensors"))
    assert found["predicted_loss_rise"]["nats_per_token"] > 0
    assert found["predicted_loss_rise"]["meaning"] == "second order, on the calibration text"
    assert found["kept"]["linears"] <= 0.7


def test_the_manifest_has_the_size_of_every_linear_layer(tmp_path: Path) -> None:
    found = run(tmp_path, {"kind": "svd"})
    assert found["linears"].keys() == found["ranks"].keys()
    for name, size in found["linears"].items():
        m, n, rank = size["out_features"], size["in_features"], found["ranks"][name]
        assert size["parameters"] == (m * n if rank is None else rank * (m + n))
    assert sum(size["parameters"] for size in found["linears"].values()) == found["parameters"]["decoder_linears"]


def test_parts_that_were_kept_are_gone_once_the_checkpoint_is_there(tmp_path: Path) -> None:
    save_tensors(tmp_path / "tokens.safetensors", {"tokens": TOKENS[:4].int()})
    method = {"kind": "aa-svd", "calibration": "c", "refine": 1}
    found = run(tmp_path, method, tokens=str(tmp_path / "tokens.safetensors"))
    assert found["kept"]["linears"] <= 0.7
    assert found["seconds"] > 0
    assert not list((tmp_path / "state").iterdir())


def test_a_method_that_predicts_nothing_says_nothing(tmp_path: Path) -> None:
    assert "predicted_loss_rise" not in run(tmp_path, {"kind": "svd"})


def test_the_card_lies_in_the_checkpoint_and_says_nothing_of_this_machine(tmp_path: Path) -> None:
    found = run(tmp_path, {"kind": "svd"})
    card = (tmp_path / "checkpoint/README.md").read_text()
    assert "README.md" not in found["files"]
    before, after = 4 * found["parameters"]["total_dense"], size_of(tmp_path / "checkpoint")
    assert found["base"] == {"name": "tiny", "source": {}, "license": "Apache-2.0", "bytes": before}
    assert f"| {found['parameters']['total_dense']:,} | {found['parameters']['total']:,} |" in card
    assert f"| bytes of weights | {before:,} | {after:,} | {100 * after / before:.2f} % |" in card
    assert "/somewhere" not in card
    assert str(tmp_path) not in card
    (tmp_path / "again").mkdir()
    run(tmp_path / "again", {"kind": "svd"})
    assert (tmp_path / "again/checkpoint/README.md").read_text() == card


def test_bytes_are_compared_with_the_base_in_the_dtype_in_which_it_was_compressed(tmp_path: Path) -> None:
    """Not with its files: half of their bytes go with the dtype alone."""
    found = run(tmp_path, {"kind": "svd"}, dtype="bfloat16")
    before, after = 2 * found["parameters"]["total_dense"], size_of(tmp_path / "checkpoint")
    assert found["base"]["bytes"] == before
    assert size_of(tmp_path / "base/model") > 2 * before
    assert (
        f"| bytes of weights | {before:,} | {after:,} | {100 * after / before:.2f} % |"
        in (tmp_path / "checkpoint/README.md").read_text()
    )


def test_with_another_licence_the_manifest_of_before_stands_and_the_card_has_the_new_one(tmp_path: Path) -> None:
    run(tmp_path, {"kind": "svd"})
    before = (tmp_path / "manifest.json").read_bytes()
    give_up(tmp_path, tmp_path / KEPT)
    run(tmp_path, {"kind": "svd"}, licence="MIT")
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert "license: mit" in (tmp_path / "checkpoint/README.md").read_text()
    load_checkpoint(tmp_path / "checkpoint", torch.float32)  # compares the files with the manifest
