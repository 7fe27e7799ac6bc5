"""A model and texts of one's own: from their paths to the small config of a study that compresses the model once.

`make compress MODEL=/data/my-model RATIO=20` runs it. Everything that the config does not say is a preset of
`config/presets/default.yaml`.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lowrank.config.base import LONGEST_NAME
from lowrank.config.load import ConfigError, check_study, models_without_shape
from lowrank.config.messages import did_you_mean
from lowrank.config.shapes import found_shape, model_files
from lowrank.config.sources import Model
from lowrank.config.study import Study
from lowrank.config.use import SHIPPED
from lowrank.config.yaml_file import read_yaml
from lowrank.errors import RankwiseError
from lowrank.files import write_error, write_text
from lowrank.model.shapes import model_config, shape_numbers
from lowrank.sources.own_texts import absolute, text_sections, validation_section

PRESETS = "presets/default.yaml"
CONFIG = "study.yaml"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Wish:
    """What is to be compressed, and how, as it is asked for: nothing of it is checked yet.

    Attributes:
        model: a folder in the Hugging Face layout, or a GGUF file.
        ratio: percent of the decoder's linear weights to remove.
        method: a preset's name.
        out: the folder of everything that comes out; empty: `compressed/<model>-<method>-<ratio>`.
        calibration: a text file or a folder of such; empty: the presets' texts, from the package index.
        test: likewise.
        dtype: of the weights; empty: that of the model, `float32` of a GGUF file.
    """

    model: str
    ratio: str
    method: str = "rankwise"
    out: str = ""
    calibration: str = ""
    test: str = ""
    dtype: str = ""


@dataclass(frozen=True)
class Own:
    """A wish as a study.

    Attributes:
        study: the study.
        text: its config.
        out: the folder in which Snakemake runs it.
        remarks: what of the wish does not count, and why; one line each.
    """

    study: Study
    text: str
    out: Path
    remarks: tuple[str, ...] = ()

    @property
    def config(self) -> Path:
        """Where the config lies."""
        return self.out / CONFIG


def own_study(wish: Wish, cache: Path) -> Own:
    """The study that grants a wish.

    Args:
        wish: what is asked for.
        cache: folder of downloads.

    Raises:
        RankwiseError: what of the wish is wrong, and what would be right.
    """
    path = absolute(wish.model, "MODEL")
    built = _built(wish, path)
    name, ratio = _name(path), _ratio(wish.ratio)
    presets = read_yaml(SHIPPED / PRESETS)
    wish, remarks = _of_concern(wish, presets)
    reads: int | None = built.get("max_position_embeddings")
    shortened = text_sections(wish.calibration, wish.test, presets, reads)
    validation = validation_section(presets, shortened)
    model: dict[str, Any] = {"source": {"path": str(path)}, "dtype": _dtype(wish, built)}
    longest: int = Model.model_fields["max_length"].default
    if (most := reads or longest) < longest:
        model["max_length"] = most
    parts = {"run": name, "cache": str(cache.absolute()), "models": {name: model}} | shortened

    def text_for(method: str) -> str:
        searches = bool(presets["methods"].get(method, {}).get("validation"))
        rows: list[dict[str, Any]] = [
            {"model": name, "method": "dense"},
            {"model": name, "method": method, "ratio": ratio, "tolerance": 5},
        ]
        return _written(wish, parts | (validation if searches else {}), rows)

    study = _checked(wish, text_for)
    default = Path("compressed") / f"{name}-{wish.method}-{ratio}"
    return Own(study, text_for(wish.method), Path(wish.out).expanduser() if wish.out else default, remarks)


def write_config(own: Own) -> None:
    """Write the config into its folder; if it is there already, the run goes on where it stopped.

    Raises:
        RankwiseError: the folder is in use for something else.
    """
    out, config = own.out, own.config
    if out.exists() and not out.is_dir():
        raise RankwiseError(f"OUT: {out} is a file; name a folder")
    if config.is_file():
        if read_yaml(config) != yaml.safe_load(own.text):
            raise RankwiseError(
                f"OUT: {config} says something else: another wish was granted there, or the file was edited. Choose "
                f"another OUT, or run it as it is: {again(own)}"
            )
        return
    try:
        if out.is_dir() and any(out.iterdir()):
            raise RankwiseError(f"OUT: {out} holds other files; choose a folder that is new or empty")
        out.mkdir(parents=True, exist_ok=True)
        write_text(config, own.text.replace("{again}", again(own)))
    except OSError as error:
        raise write_error(config, error) from error


def again(own: Own) -> str:
    """The command that runs a config again, after a change too, in this repository; no environment need be active."""
    snakemake, config, out = (
        shlex.quote(str(path)) for path in (_beside_python("snakemake"), own.config.absolute(), own.out.absolute())
    )
    return f"{snakemake} --configfile {config} --directory {out} --profile profiles/local"


def _beside_python(command: str) -> Path:
    """A command of the environment that this runs in; its links stay, for they are what makes it that one."""
    return Path(sys.executable).parent / command


# --- the parts of a wish ---


def _built(wish: Wish, path: Path) -> dict[str, Any]:
    """What the model's `config.json`, or its GGUF file, says."""
    if not wish.model:
        raise RankwiseError("MODEL: missing; name a folder in the Hugging Face layout, or a .gguf file")
    if not path.exists():
        raise RankwiseError(f"MODEL: there is no {path}{_of_the_hub(wish.model)}")
    if path.is_file() and path.suffix != ".gguf":
        raise RankwiseError(f"MODEL: {path} is neither a folder in the Hugging Face layout nor a .gguf file")
    try:
        built = model_config(model_files({"path": str(path)}))
        found_shape(shape_numbers(built))
    except RankwiseError as error:
        raise RankwiseError(f"MODEL: {path}: {error}") from error
    return built


def _of_the_hub(given: str) -> str:
    """What to do with a name as models have on the hub."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", given, re.ASCII):
        return ""
    folder = given.partition("/")[2]
    return (
        f". If it is a model of the hub: fetch it by `hf download {given} --local-dir {folder}`, and give "
        f"MODEL={folder}; or write a config with `source: {{hub: ..., revision: ...}}` (docs/own_model.md)"
    )


def _name(path: Path) -> str:
    """A model's name in the config: that of its folder or file, with the characters that names may have."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem if path.suffix == ".gguf" else path.name)
    return name.strip("._-")[:LONGEST_NAME].rstrip("._-") or "model"


def _ratio(given: str) -> int:
    try:
        ratio = int(given)
    except ValueError:
        ratio = 0
    if not given.strip():
        raise RankwiseError("RATIO: missing; give a whole number from 1 to 90, the percentage to remove")
    if not 1 <= ratio <= 90:
        raise RankwiseError(f"RATIO: must be a whole number from 1 to 90, the percentage to remove, not {given}")
    return ratio


def _of_concern(wish: Wish, presets: dict[str, Any]) -> tuple[Wish, tuple[str, ...]]:
    """A wish without what cannot concern its method, and a line for what is left out."""
    preset = presets["methods"].get(wish.method)
    if wish.calibration and preset and "calibration" not in preset:
        return replace(wish, calibration=""), (f"{wish.method} reads no calibration text: CALIBRATION is not used",)
    return wish, ()


def _dtype(wish: Wish, built: dict[str, Any]) -> str:
    if wish.dtype and wish.dtype not in DTYPES:
        raise RankwiseError(
            f"DTYPE: '{wish.dtype}' is not one of {', '.join(DTYPES)}{did_you_mean(wish.dtype, DTYPES)}"
        )
    stored = built.get("dtype") or built.get("torch_dtype")
    return wish.dtype or (stored if stored in DTYPES else "float32")


# --- the config ---


def _written(wish: Wish, parts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The config, for people to read and edit: one line an entry."""
    asked = {
        "MODEL": wish.model,
        "RATIO": wish.ratio,
        "METHOD": wish.method,
        "CALIBRATION": wish.calibration,
        "TEST": wish.test,
        "DTYPE": wish.dtype,
        "OUT": wish.out,
    }
    words = " ".join(f"{key}={' '.join(value.split())}" for key, value in asked.items() if value)
    lines = [f"# make compress {words}; again, after a change too: {{again}}", f"use: {PRESETS}"]
    for key, value in parts.items():
        if isinstance(value, dict) and len(value) > 1:
            lines += [f"{key}:", *(f"  {_flow(name)}: {_flow(entry)}" for name, entry in value.items())]
        else:
            lines.append(f"{key}: {_flow(value)}")
    model = rows[0]["model"]
    quality = {"kind": "accuracy", "title": f"Perplexity of {model}", "suites": ["perplexity"]}
    speed = {"kind": "times", "title": "Measured times and memory", "suites": ["cost"]}
    shown = ", ".join(map(_flow, rows))
    return "\n".join(
        [
            *lines,
            "tables:",
            f"  quality: {_flow(quality)[:-1]}, rows: &rows [{shown}]}}",
            f"  speed: {_flow(speed)[:-1]}, rows: *rows}}\n",
        ]
    )


def _flow(value: Any) -> str:
    """A value on one line. JSON is YAML too; keys need no quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(key)}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z/][\w/. -]*[\w/.]", value, re.ASCII)
    return value if plain and yaml.safe_load(value) == value else json.dumps(value, ensure_ascii=False)


def _checked(wish: Wish, text_for: Callable[[str], str]) -> Study:
    """The study with the method of the wish.

    Raises:
        RankwiseError: there is no such method, or it does not fit the model; those that do are named.
    """
    presets = read_yaml(SHIPPED / PRESETS)["methods"]
    known = sorted(name for name, entry in presets.items() if entry["kind"] != "dense")
    try:
        if wish.method not in known:
            raise RankwiseError(f"'{wish.method}' is no method{did_you_mean(wish.method, known)}")
        return _study(text_for(wish.method))
    except RankwiseError as error:
        fitting = [name for name in known if name != wish.method and _fits(text_for(name))]
        if wish.method in known and not (fitting and _is_of_method(error)):
            raise
        raise RankwiseError(f"METHOD: {error}\nThese work with this model and ratio: {', '.join(fitting)}") from error


def _is_of_method(error: RankwiseError) -> bool:
    """Whether all mistakes are about a method or its row, and none about texts or suites."""
    return isinstance(error, ConfigError) and error.sections <= {"methods", "tables"}


def _study(text: str) -> Study:
    study = check_study(yaml.safe_load(text), "the study")
    assert not models_without_shape(study)
    return study


def _fits(text: str) -> bool:
    try:
        _study(text)
    except RankwiseError:
        return False
    return True
