"""Fetching a model: a checkpoint folder in the Hugging Face layout, checked against the config before any use."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lowrank.config.sources import HubSource, Model, RandomSource
from lowrank.errors import RankwiseError
from lowrank.files import LEGAL_FILES, atomic_path, link_or_copy, read_record, sha256_file
from lowrank.model.runtime import parse_dtype
from lowrank.model.shapes import require_no_adapter
from lowrank.sources import checks, hub
from lowrank.sources.disk import require_free
from lowrank.sources.gguf import convert_gguf
from lowrank.sources.random import make_random_checkpoint
from lowrank.sources.resolve import placed, source_files

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
COMPANIONS = (".json", ".txt", ".model", ".jinja")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def fetch_model(name: str, model: Model, cache: Path, target: Path, tokenizer: Path | None = None) -> dict[str, Any]:
    """Make the checkpoint folder of a dense model.

    A GGUF file is converted to the config's dtype; other weights keep the dtype that they are stored in. Weight files
    of the hub's cache are linked where the file system allows it, those of a `path:` are copied. The weights are
    checked tensor by tensor, so a model larger than the memory passes.

    Args:
        name: the model's name in the config.
        model: its section.
        cache: folder of downloads.
        target: the folder to make; it appears when everything in it is checked.
        tokenizer: checkpoint folder that lends its tokenizer to a random model.

    Returns:
        The manifest: source, shape, number of parameters, and the SHA-256 of each file.

    Raises:
        RankwiseError: the model cannot be had or read, or it is not what the config says; nothing is left behind.
    """
    with placed(f"models.{name}"), _files(model, cache) as files, atomic_path(target) as folder:
        folder.mkdir()
        if isinstance(model.source, RandomSource):
            make_random_checkpoint(model, model.source.random, tokenizer, folder)
        elif len(files) == 1 and files[0].suffix == ".gguf":
            convert_gguf(files[0], folder, parse_dtype(model.dtype))
        else:
            copy_checkpoint(files, folder, link=isinstance(model.source, HubSource))
        model = checks.with_shape(model, folder)
        parameters = checks.check_checkpoint(name, model, folder, weight_files(folder))
        manifest = {
            "model": name,
            "source": model.source.plain(),
            "shape": model.shape.plain(),
            "parameters": parameters,
            "files": {file.name: sha256_file(file) for file in sorted(folder.iterdir())},
        }
    log.info("model %s: %.1f M parameters", name, parameters / 1e6)
    return manifest


@contextmanager
def _files(model: Model, cache: Path) -> Iterator[list[Path]]:
    if isinstance(model.source, HubSource):
        yield hub.fetch_snapshot(model.source)
        return
    if isinstance(model.source, RandomSource):
        yield []
        return
    with source_files(model.source, cache) as files:
        yield files


def copy_checkpoint(files: list[Path], folder: Path, link: bool) -> None:
    """Bring weights, configuration, tokenizer and licence of a checkpoint into `folder`; nothing else.

    Weights are hard links if `link` says that nobody will ever change the source's files, and copies if not.

    Raises:
        RankwiseError: no `config.json`, an adapter beside it, no safetensors weights, a missing shard, or a full disk.
    """
    configs = [file for file in files if file.name == "config.json"]
    if len(configs) != 1:
        found = ", ".join(sorted(file.name for file in files)[:8]) or "no file"
        raise RankwiseError(
            "a model is a GGUF file or a folder with one `config.json`, "
            f"and here are {len(configs)} of those ({found})."
        )
    require_no_adapter(configs[0], files)
    source = configs[0].parent
    weights = weight_files(source)
    sharded = weights != [source / WEIGHTS]
    require_free(folder, sum(file.stat().st_size for file in weights), "the model")
    for file in weights:
        if link:
            link_or_copy(file, folder / file.name)
        else:
            shutil.copyfile(file, folder / file.name)
    for file in files:
        legal = file.suffix in ("", ".md", ".txt") and any(fnmatch(file.name, pattern) for pattern in LEGAL_FILES)
        wanted = file.parent == source and (file.suffix in COMPANIONS or legal)
        if wanted and file.name == INDEX and not sharded:
            log.info("%s is left out: `%s` lies beside it, and holds all weights", INDEX, WEIGHTS)
        elif wanted and (file.name == INDEX or not file.name.endswith(".index.json")):
            shutil.copyfile(file, folder / file.name)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model of a folder: the one file, or the shards of its index.

    Where both are there, the one file is what transformers opens.

    Raises:
        RankwiseError: there are none, or a shard of the index is missing.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        index = read_record(folder / INDEX)
        names = index.get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise RankwiseError(f"{folder / INDEX}: has no `weight_map`. Fetch the file again.")
        files = [folder / name for name in sorted(set(names.values()))]
        if missing := [file.name for file in files if file.parent != folder or not file.is_file()]:
            raise RankwiseError(f"{folder}: the index lists files that are not there: {', '.join(missing)}. Add them.")
        return files
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    only = f", only pickles ({', '.join(pickles)}), which can run code and are never loaded" if pickles else ""
    raise RankwiseError(
        f"{folder}: no `{WEIGHTS}` or `{INDEX}`{only}. Take a revision with safetensors weights, or save the model "
        "once with transformers' `save_pretrained`."
    )
