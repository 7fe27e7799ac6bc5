"""Checkpoints: the base model plus a recipe, opened by `from_pretrained`, inside this repository and outside."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lowrank.errors import RankwiseError
from lowrank.files import LEGAL_FILES, atomic_path, link_or_copy
from lowrank.manifest import check_manifest, checksums_of
from lowrank.model import modeling_rankwise
from lowrank.model.attention import repeat_keys_without_flash
from lowrank.model.devices import Devices, spread
from lowrank.model.factors import SharedDownFactors
from lowrank.model.families import FAMILIES, Family, family_with, unknown_family
from lowrank.model.older_names import older_names
from lowrank.model.replacements import ChangedModule, Pair, Replacements
from lowrank.model.tokenizer import keep_tokenizer_class

log = logging.getLogger(__name__)

MODELING_FILE = Path(modeling_rankwise.__file__)
MODEL_TYPE_PREFIX = "rankwise_"
CARD = "README.md"
LARGEST_FILE = "5GB"
"""Of weights; what is more goes into several files, with an index."""

for _config, _base, _causal in modeling_rankwise.CONFIGS.values():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _base, exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal, exist_ok=True)
transformers_logging.disable_progress_bar()
repeat_keys_without_flash()


def load_checkpoint(
    folder: str | Path, dtype: torch.dtype, devices: Devices = "cpu", beside: float = 0
) -> PreTrainedModel:
    """Open a dense or compressed checkpoint for inference; fused projections and experts' matrices become a layer each.

    Args:
        folder: of the checkpoint.
        dtype: to open it in.
        devices: where it goes; over several, block by block.
        beside: bytes that will lie beside each block, on its device.

    Checkpoints of this project need no remote code here: their classes are registered from this repository. No code
    that lies in the folder is ever run.

    Raises:
        RankwiseError: the folder holds no readable model, weights are missing, or a file is not the one that the
            manifest beside the folder describes; the folder is named.
    """
    folder = Path(folder)
    if folder.is_symlink():  # to delete a link would mend nothing
        folder = folder.resolve()
    if not (folder / "config.json").is_file():
        raise RankwiseError(
            f"{folder}: no checkpoint (config.json is missing). Delete the folder and run the workflow again."
        )
    check_manifest(folder, "files")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        drop_remote_code(config)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa",  # a model's own config may name another, which knows none of our masks
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise RankwiseError(
            f"{folder}: the checkpoint cannot be opened: {error}. Delete the folder and run the workflow again."
        ) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise RankwiseError(
            f"{folder}: damaged weights: {error}. Delete the folder and run the workflow again."
        ) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(problem):
            named = f"{problem.replace('_', ' ')}: {sorted(map(str, report[problem]))[:5]}"
            raise RankwiseError(f"{folder}: {named}. Delete the folder and run the workflow again.")
    modeling_rankwise.separate_projections(model)
    model.eval().requires_grad_(False)
    return spread(model, family_of(model).blocks, devices, beside)


def drop_remote_code(config: Any) -> None:
    """Take this repository's classes instead of the copy inside the checkpoint."""
    if str(getattr(config, "model_type", "")).startswith(MODEL_TYPE_PREFIX) and hasattr(config, "auto_map"):
        del config.auto_map


def family_of(model: PreTrainedModel) -> Family:
    """The family of a model, dense or compressed, with the types of each of its experts.

    Raises:
        RankwiseError: a model type that is not in `FAMILIES`.
    """
    model_type = str(model.config.model_type).removeprefix(MODEL_TYPE_PREFIX)
    if model_type not in FAMILIES:
        raise RankwiseError(unknown_family(model.config.to_dict()))
    return family_with(model_type, getattr(model.config, "num_experts", 0))


def recipe_of(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """What each module became, as `config.json` stores it; read off the model itself."""
    return {name: module.recipe_entry() for name, module in model.named_modules() if hasattr(module, "recipe_entry")}


def replace_modules(model: PreTrainedModel, replacements: Replacements) -> dict[str, int]:
    """Change modules of a model, in place, in its dtype and on its device, one after the other.

    Returns:
        Name -> rank of what is a low-rank pair now.

    Raises:
        RankwiseError: a new weight is not finite; the module is named.
    """
    ranks: dict[str, int] = {}
    waiting: list[tuple[str, SharedDownFactors]] = []  # for the layer whose factor they share
    for name in replacements:
        replacement = replacements[name]
        if isinstance(replacement, Pair):
            ranks[name] = replacement.rank
        if isinstance(replacement, SharedDownFactors):
            if replacement.shares in ranks:
                _put_shared(model, name, replacement)
            else:
                waiting.append((name, replacement))
        elif isinstance(replacement, ChangedModule):
            replacement.change(model.get_submodule(name), model.dtype, model.device)
            _require_finite(model, name)
        else:
            _put(model, name, replacement.as_module(model.dtype, model.device))
    for name, shared in waiting:
        _put_shared(model, name, shared)
    return ranks


def _put_shared(model: PreTrainedModel, name: str, shared: SharedDownFactors) -> None:
    """Have a layer beside the one whose factor it shares, which is there."""
    owner: Any = model.get_submodule(shared.shares)
    _put(model, name, shared.as_module(owner, model.dtype, model.device))


def _put(model: PreTrainedModel, name: str, module: torch.nn.Module) -> None:
    """Have another module in the place of one."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
    _require_finite(model, name)


def _require_finite(model: PreTrainedModel, name: str) -> None:
    for parameter in model.get_submodule(name).parameters():
        if not bool(parameter.isfinite().all()):
            raise RankwiseError(
                f"{name}: its new weights are not finite in {parameter.dtype}. "
                "Set `dtype: float32` for this model in the config, or look for outliers in its statistics."
            )


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer_from: str | Path,
    target: str | Path,
    card: Callable[[Path], str] | None = None,
) -> dict[str, str]:
    """Write a checkpoint folder, atomically: safetensors (in files of 5 GB, with an
    index, if there are more than one), config with recipe, model code, tokenizer, model card.

    A model in which nothing changed is written as a plain checkpoint of its base architecture.

    Args:
        model: dense or compressed.
        tokenizer_from: folder of its tokenizer and its licence.
        target: the folder to make.
        card: the text of its README.md, given the folder with its weights; None: no card.

    Returns:
        File name -> SHA-256 of its content. The card is left out: it holds a licence, which may change in the config
        while all else stays.
    """
    target = Path(target)
    recipe = recipe_of(model)
    with atomic_path(target) as folder:
        own = model.state_dict(keep_vars=True)
        here = {id(tensor): tensor.detach().cpu() for tensor in own.values()}  # tied ones once, from a GPU too
        state = {name: here[id(tensor)] for name, tensor in own.items()}
        family = family_of(model)
        state = state if recipe else as_stored(state, family)
        # transformers would rename what it thinks to be stacked; here experts are stored one by one already.
        in_its_format = not family.experts
        model.save_pretrained(folder, state_dict=state, max_shard_size=LARGEST_FILE, save_original_format=in_its_format)
        _write_config(folder, model, recipe)
        if recipe:
            shutil.copyfile(MODELING_FILE, folder / MODELING_FILE.name)
        copy_companions(Path(tokenizer_from), folder)
        if recipe:
            keep_tokenizer_class(Path(tokenizer_from), folder)
        if card is not None:
            (folder / CARD).write_text(card(folder), encoding="utf-8")
    return {name: checksum for name, checksum in checksums_of(target).items() if name != CARD}


def as_stored(state: dict[str, torch.Tensor], family: Family) -> dict[str, torch.Tensor]:
    """Weights as checkpoints of the base architecture store them: fused layers, other names, and experts one by one."""
    for path, names in family.fused.items():
        own = [linear.path for linear in family.types if linear.name in names]
        blocks = [name.removesuffix(f".{own[0]}.weight") for name in state if name.endswith(f".{own[0]}.weight")]
        for block in blocks:
            state[f"{block}.{path}.weight"] = torch.cat([state.pop(f"{block}.{each}.weight") for each in own])
    return {stored_name(name, family): tensor for name, tensor in state.items()} if family.stored else state


def stored_name(name: str, family: Family) -> str:
    """A parameter's name in checkpoints of the base architecture, but for layers that are fused there."""
    for own, stored in family.stored.items():
        name = name.replace(own, stored)
    return name


def _write_config(folder: Path, model: PreTrainedModel, recipe: dict[str, dict[str, Any]]) -> None:
    """Rewrite config.json so that it names the rankwise classes of the model's family, or none if it is dense."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    family = family_of(model).model_type
    config.pop("auto_map", None)
    config.pop("recipe", None)
    config.pop("_name_or_path", None)
    config["model_type"] = family
    if recipe:
        config_class, base_class, causal_class = modeling_rankwise.CONFIGS[family]
        module = MODELING_FILE.stem
        config["model_type"] = config_class.model_type
        config["architectures"] = [causal_class.__name__]
        config["recipe"] = recipe
        config["auto_map"] = {
            "AutoConfig": f"{module}.{config_class.__name__}",
            "AutoModel": f"{module}.{base_class.__name__}",
            "AutoModelForCausalLM": f"{module}.{causal_class.__name__}",
        }
    config |= older_names(config)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_companions(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer, the generation config, and the licence byte for byte."""
    patterns = (
        *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.jinja"),
        "tekken.json",  # Mistral's: the whole of a tokenizer
        "generation_config.json",
        *LEGAL_FILES,
    )
    for pattern in patterns:
        for path in source.glob(pattern):
            if path.is_file() and path.suffix != ".py":
                shutil.copyfile(path, target / path.name)


def link_checkpoint(source: str | Path, target: str | Path) -> dict[str, str]:
    """A checkpoint with the same files as another one: hard links where the disk allows, copies elsewhere."""
    source, target = Path(source), Path(target)
    with atomic_path(target) as folder:
        folder.mkdir()
        for path in sorted(source.iterdir()):
            if path.is_file():
                link_or_copy(path, folder / path.name)
    return checksums_of(target)
