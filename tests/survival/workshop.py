"""Finished artefacts of a tiny study, as the stages write them, made in this process; and ways to damage them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.bases.block import bases_of_block
from lowrank.calibration.corpora import sample_calibration
from lowrank.calibration.output_gradients import OutputGradients, collect_output_gradients
from lowrank.calibration.statistics import Statistics, collect_statistics, load_moments
from lowrank.compression.compress import compress_model
from lowrank.compression.eliminate_neurons import eliminate_neurons
from lowrank.config.presets import Calibration, Covariance
from lowrank.config.sources import Corpus, Model, ModelShape
from lowrank.errors import RankwiseError
from lowrank.files import layer_name, load_tensors, publish_layers, save_tensors, sha256_file, write_json
from lowrank.jobs.state import Parts
from lowrank.model.checkpoint import family_of, load_checkpoint, save_checkpoint
from lowrank.model.stored_blocks import StoredBlocks
from lowrank.ranks.budget import Budget
from lowrank.sources.models import fetch_model
from lowrank.sources.texts import fetch_corpus
from tests import tiny, tiny_study

CPU = torch.device("cpu")
KIND = "llama-gqa"
VOCABULARY = len(tiny.tokenizer())
SHAPE = ModelShape.model_validate(tiny.shape(KIND, VOCABULARY))
NAIVE = Covariance(estimator="naive")


def model_section(folder: Path) -> Model:
    """The config's section of the model that lies in a folder."""
    return Model.model_validate({"source": {"path": str(folder)}, "shape": SHAPE.plain(), "max_length": 256})


def build(root: Path) -> None:
    """Sources in `root/sources`, and `root/run` as a run leaves it, without the evaluations."""
    sources, run = root / "sources", root / "run"
    tiny.model(KIND, VOCABULARY).save_pretrained(sources / "model")
    tiny.tokenizer().save_pretrained(sources / "model")
    tiny_study.write_lines(sources / "text.jsonl", [{"text": tiny.text(index, 100)} for index in range(12)])
    manifest = fetch_model("tiny", model_section(sources / "model"), root / "cache", run / "models/tiny")
    write_json(run / "models/tiny.json", manifest)
    section = {"source": {"path": str(sources / "text.jsonl")}, "format": "jsonl"}
    fetch_corpus(
        "text",
        Corpus.model_validate(section),
        root / "cache",
        run / "corpora/text.json",
        run / "corpora/data/text.jsonl",
    )
    calibration = Calibration.model_validate({"corpora": ["text"], "windows": 6, "length": 32})
    tokens_file = run / "calibration/tiny/c.safetensors"
    sample_calibration("tiny", calibration, run / "models/tiny", [run / "corpora/text.json"], tokens_file)
    tokens = load_tensors(tokens_file)["tokens"].long()
    model = load_checkpoint(run / "models/tiny", torch.float32)
    family = family_of(model)
    statistics, gradients, bases = (run / name / "layers" for name in ("statistics", "gradients", "bases"))
    for folder, collect in ((statistics, collect_statistics), (gradients, collect_output_gradients)):
        folder.mkdir(parents=True)
        collect(model, tokens, 1, folder, CPU)
        for path in folder.iterdir():
            if path.is_dir():  # the hidden states of a pass
                for inner in path.iterdir():
                    inner.unlink()
                path.rmdir()
    for layer in range(tiny.LAYERS):
        modules = {t.name: (t.site, model.get_submodule(f"{family.blocks}.{layer}.{t.path}")) for t in family.types}
        linears = {name: (site, module.weight, module.bias) for name, (site, module) in modules.items()}
        moments = load_moments(statistics / layer_name(layer), family.sites)
        save_tensors(bases / layer_name(layer), bases_of_block(linears, moments, NAIVE, CPU, f"block {layer}"))
    neurons, parts = run / "neurons/layers", Parts(root / ".state")
    calibrated = Statistics(statistics, SHAPE), OutputGradients(gradients, SHAPE)
    eliminate_neurons(
        StoredBlocks(run / "models/tiny", SHAPE, torch.float32).layers, Budget.of(SHAPE), *calibrated, NAIVE, CPU, parts
    )
    publish_layers(parts.folder, neurons)
    for folder in (statistics, gradients, bases, neurons):
        layers = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
        write_json(folder.with_name("manifest.json"), {"layers": layers})
    task = {"model": model, "budget": Budget.of(SHAPE), "ratio": 20, "seed": 0}
    ranks = compress_model("svd", {"kind": "svd"}, task)
    files = save_checkpoint(model, run / "models/tiny", run / "compressed/checkpoint")
    write_json(run / "compressed/manifest.json", {"files": files, "ranks": ranks})


def truncated(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path, bit: int) -> None:
    """Turn over one bit; negative ones count from the end."""
    data = bytearray(path.read_bytes())
    position = bit % (8 * len(data))
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)


def flipped(path: Path) -> None:
    """One bit of the last tensor: still a readable safetensors file, with another number in it."""
    flip(path, -3)


def replaced(path: Path) -> None:
    """Another file of the same kind: readable, and not this one."""
    tensors = load_tensors(path)
    path.unlink()
    save_tensors(path, {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()})


def removed(path: Path) -> None:
    path.unlink()


def garbage(path: Path) -> None:
    """What a malicious file of this name might be: a pickle."""
    torch.save({"weight": torch.zeros(3)}, path)


def half_json(path: Path) -> None:
    text = path.read_text()
    path.write_text(text[: len(text) // 2])


def no_utf8(path: Path) -> None:
    path.write_bytes(b"\xff\xfe" + path.read_bytes())


def empty_object(path: Path) -> None:
    path.write_text("{}")


def a_list(path: Path) -> None:
    path.write_text("[]")


def disagreeing(path: Path) -> None:
    """A manifest that says something else of the files: the digests of all are one digit off."""

    def changed(value: object) -> object:
        if isinstance(value, dict):
            return {key: changed(item) for key, item in value.items()}
        if isinstance(value, str) and len(value) == 64:
            return ("1" if value[0] != "1" else "2") + value[1:]
        return value

    path.write_text(json.dumps(changed(json.loads(path.read_text()))))


Damage = Callable[[Path], None]


def snapshot(root: Path) -> dict[str, bytes]:
    """Content of all files below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def refused(run: Path, file: Path, read: Callable[[Path], Any]) -> str:
    """The message of an error that names the file (or the folder that is made as a whole), and spoils nothing."""
    before = snapshot(run)
    with pytest.raises(RankwiseError, match=r"[Rr]un the workflow again") as caught:
        read(run)
    message = str(caught.value)
    named = [file, *file.parents]
    assert any(str(path) in message for path in named[: 1 + named.index(run)][:-1]), message
    assert "Traceback" not in message
    assert snapshot(run) == before
    return message
