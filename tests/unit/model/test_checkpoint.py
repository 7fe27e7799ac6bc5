"""Checkpoints open anywhere with equal logits; what is wrong with one is said."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.model.checkpoint import (
    copy_companions,
    family_of,
    link_checkpoint,
    load_checkpoint,
    recipe_of,
    replace_modules,
    save_checkpoint,
)
from lowrank.model.factors import LowRankFactors
from lowrank.model.parameters import count_parameters
from lowrank.model.tokenizer import load_tokenizer
from tests import tiny

OUTSIDE = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not any("workflow_scripts" in path for path in sys.path)
for folder in sys.argv[1:]:
    expected = load_file(f"{folder}.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(model(expected["ids"]).logits, expected["logits"]), folder
    ids = tokenizer("river stone", return_tensors="pt")["input_ids"]
    print(tuple(model.generate(ids, max_new_tokens=3, do_sample=False).shape)[1] - ids.shape[1])
"""


def open_outside(folder: Path, models: Mapping[str, torch.nn.Module], ids: torch.Tensor) -> dict[str, int]:
    """Save models, and open them in a process that knows nothing of this repository and finds the same logits there.

    Returns:
        How many tokens each writes after a few words, at most three.
    """
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    for name, model in models.items():
        save_checkpoint(model, folder / "tokenizer", folder / name)
        save_file({"ids": ids, "logits": model(ids).logits.contiguous()}, folder / f"{name}.safetensors")
    run = subprocess.run(
        [sys.executable, "-c", OUTSIDE, *(str(folder / name) for name in models)],
        cwd=folder,
        env={
            "HF_MODULES_CACHE": str(folder / "modules"),
            "HF_HUB_OFFLINE": "1",
            "PATH": "/usr/bin",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),  # which the last digits depend on
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return dict(zip(models, map(int, run.stdout.split()), strict=True))


def compressed(kind: str, rank: int = 8, bias: bool = True) -> tuple[torch.nn.Module, dict[str, LowRankFactors]]:
    """A tiny model with random factors in every layer but v of its blocks."""
    model = tiny.model(kind)
    family = family_of(model)
    factors = {}
    for layer in range(tiny.LAYERS):
        for linear in family.types:
            if linear.name != "v":
                name = f"{family.blocks}.{layer}.{linear.path}"
                m, n = model.get_submodule(name).weight.shape
                pair = LowRankFactors(
                    torch.randn(rank, n) / 8, torch.randn(m, rank) / 8, torch.randn(m) if bias else None
                )
                factors[name] = pair
    replace_modules(model, factors)
    return model, factors


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", tiny.ALL_SHAPES)
def test_a_checkpoint_reads_back_bit_for_bit(kind: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    model, factors = compressed(kind)
    files = save_checkpoint(model, tokenizer_folder, tmp_path / "checkpoint")
    assert {"config.json", "model.safetensors", "modeling_rankwise.py", "tokenizer.json"} <= set(files)
    again = load_checkpoint(tmp_path / "checkpoint", torch.float32)
    ids = torch.randint(2, 400, (2, 12))
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert set(recipe_of(again)) == set(factors)


def test_checkpoints_open_outside_the_repository(tmp_path: Path) -> None:
    models = {kind: compressed(kind)[0] for kind in ("llama-gqa", *tiny.FEW, *tiny.MIXTURES)}
    written = open_outside(tmp_path, models, torch.randint(2, 400, (2, 12)))
    assert written.keys() == models.keys()
    assert set(written.values()) <= {1, 2, 3}  # fewer than three tokens only if the model ends its answer


def test_tied_weights_are_stored_once_from_a_device_too(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = compressed("llama-gqa")
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)  # as from a GPU: another tensor for each call
    save_checkpoint(model, tokenizer_folder, tmp_path / "checkpoint")
    assert "lm_head.weight" not in load_file(tmp_path / "checkpoint/model.safetensors")


def test_a_dense_checkpoint_has_no_code_in_it(tmp_path: Path, tokenizer_folder: Path) -> None:
    model = tiny.model("llama-gqa")
    files = save_checkpoint(model, tokenizer_folder, tmp_path / "dense")
    assert not any(name.endswith(".py") for name in files)
    assert json.loads((tmp_path / "dense/config.json").read_text())["model_type"] == "llama"
    linked = link_checkpoint(tmp_path / "dense", tmp_path / "linked")
    assert linked == files
    load_checkpoint(tmp_path / "linked", torch.float32)
    load_tokenizer(tmp_path / "linked")


def test_every_file_that_a_tokenizer_may_be_comes_along_and_nothing_else(tmp_path: Path) -> None:
    made_from, target = tmp_path / "from", tmp_path / "to"
    names = {"tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tekken.json", "chat_template.jinja"}
    for folder in (made_from, target):
        folder.mkdir()
    for name in (*names, "config.json", "model.safetensors", "tokenizer_of_ours.py"):
        (made_from / name).write_text(name)
    copy_companions(made_from, target)
    assert {path.name for path in target.iterdir()} == names


@pytest.mark.parametrize("kind", tiny.ALL_SHAPES)
def test_parameters_are_counted_as_stored(kind: str) -> None:
    shape = ModelShape(**tiny.shape(kind))
    dense = tiny.model(kind)
    counts = count_parameters(dense, shape)
    assert counts["total"] == counts["total_dense"] == dense.num_parameters()
    assert counts["decoder_linears"] == counts["decoder_linears_dense"]
    model, _ = compressed(kind)
    counts = count_parameters(model, shape)
    assert counts["total"] == model.num_parameters()
    assert counts["total_dense"] == dense.num_parameters()
    saved = counts["total_dense"] - counts["total"]
    assert counts["decoder_linears_dense"] - counts["decoder_linears"] == saved


def test_factors_that_overflow_name_the_layer() -> None:
    model = tiny.model("llama-gqa").half()
    name = "model.layers.1.mlp.up_proj"
    m, n = model.get_submodule(name).weight.shape
    with pytest.raises(RankwiseError, match=f"{name}: its new weights are not finite in torch.float16"):
        replace_modules(model, {name: LowRankFactors(torch.full((8, n), 1e6), torch.ones(m, 8))})


def damage(folder: Path, what: str) -> None:
    weights = folder / "model.safetensors"
    if what == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif what == "missing weights":
        weights.unlink()
    elif what == "no config":
        (folder / "config.json").unlink()
    elif what == "unknown kind":
        config = json.loads((folder / "config.json").read_text())
        next(iter(config["recipe"].values()))["kind"] = "magic"
        (folder / "config.json").write_text(json.dumps(config))
    elif what == "wrong rank":
        config = json.loads((folder / "config.json").read_text())
        next(iter(config["recipe"].values()))["rank"] += 1
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("what", ["truncated", "missing weights", "no config", "unknown kind", "wrong rank"])
def test_a_damaged_checkpoint_is_refused_by_name(what: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    model, _ = compressed("llama-gqa")
    save_checkpoint(model, tokenizer_folder, tmp_path / "checkpoint")
    damage(tmp_path / "checkpoint", what)
    with pytest.raises(RankwiseError, match=str(tmp_path / "checkpoint")):
        load_checkpoint(tmp_path / "checkpoint", torch.float32)


def test_a_pickle_is_never_loaded(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = tmp_path / "checkpoint"
    save_checkpoint(tiny.model("llama-gqa"), tokenizer_folder, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(RankwiseError, match=str(folder)):
        load_checkpoint(folder, torch.float32)


def test_a_failed_write_leaves_the_finished_checkpoint(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model("llama-gqa")
    save_checkpoint(model, tokenizer_folder, tmp_path / "checkpoint")
    before = (tmp_path / "checkpoint/model.safetensors").read_bytes()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(RankwiseError, match="no space left on the disk"):
        save_checkpoint(model, tokenizer_folder, tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint/model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_damaged_checkpoint_behind_a_link_is_named_itself(tmp_path: Path) -> None:
    """Who deletes the link has mended nothing."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(RankwiseError, match=f"^{tmp_path}/real: no checkpoint"):
        load_checkpoint(tmp_path / "link", torch.float32)
