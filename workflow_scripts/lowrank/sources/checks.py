"""Is a checkpoint what the config says? Its configuration, its linear layers, its weights and its tokenizer."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lowrank.config.shapes import found_shape
from lowrank.config.sources import Model
from lowrank.errors import RankwiseError
from lowrank.files import read_record
from lowrank.model.checkpoint import stored_name
from lowrank.model.families import FAMILIES, Family, has_native_bias, linear_modules, unknown_family
from lowrank.model.modeling_rankwise import separate_projections
from lowrank.model.shapes import bias_options, expert_numbers, intermediate_of, require_experts_everywhere

log = logging.getLogger(__name__)

SHOWN = 14  # more than the keys of `shape`, so that all of those are listed
CHUNK = 2**22  # numbers of a tensor that are compared at once


def check_checkpoint(name: str, model: Model, folder: Path, weights: list[Path]) -> int:
    """Check a checkpoint folder against its section of the config.

    Args:
        name: the model's name in the config, for messages.
        model: its section.
        folder: the checkpoint.
        weights: its safetensors files.

    Returns:
        The number of parameters; tied ones count once.

    Raises:
        RankwiseError: the first kind of problem found, with all its instances (fourteen at most).
    """
    raw = read_record(folder / "config.json")
    _check_architecture(raw)
    _check_remote_code(folder, raw)
    config = _load_config(folder)
    _check_numbers(name, model, config)
    _check_positions(name, model, config)
    skeleton, separated = skeleton_of(config), skeleton_of(config)
    separate_projections(separated)
    _check_linears(model, separated)
    family = FAMILIES[config.model_type]
    _check_weights(separated if family.experts else skeleton, weights, family)
    if config.tie_word_embeddings:
        _check_tied_head(name, skeleton, weights)
    _check_tokenizer(name, model, folder)
    return sum(parameter.numel() for parameter in skeleton.parameters())


def _check_architecture(raw: dict[str, Any]) -> None:
    if raw.get("model_type") not in FAMILIES:
        raise RankwiseError(unknown_family(raw))
    if "quantization_config" in raw:
        raise RankwiseError("its weights are quantised (`quantization_config`); take the unquantised model.")
    require_experts_everywhere(raw)


def _check_remote_code(folder: Path, raw: dict[str, Any]) -> None:
    tokenizer = folder / "tokenizer_config.json"
    maps = [raw.get("auto_map"), read_record(tokenizer).get("auto_map") if tokenizer.is_file() else None]
    if any(maps):
        raise RankwiseError(
            "it brings Python code of its own (`auto_map`), which is never run here. If its architecture is one of the "
            "families that transformers knows, take out `auto_map` from its JSON files."
        )


def _load_config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a strange value raises in the class of the architecture
        raise RankwiseError(f"its config.json cannot be read by transformers ({error}).") from error


def with_shape(model: Model, folder: Path) -> Model:
    """The section, with the shape of the checkpoint if it states none.

    Raises:
        RankwiseError: the architecture is unknown, or its numbers are impossible.
    """
    if model.shape is not None:
        return model
    raw = read_record(folder / "config.json")
    _check_architecture(raw)
    _check_remote_code(folder, raw)
    return model.model_copy(update={"shape": found_shape(model_numbers(_load_config(folder)))})


def model_numbers(config: Any) -> dict[str, Any]:
    """The numbers of a transformers configuration under the names of `models.<name>.shape`."""
    heads = config.num_attention_heads
    return {
        "family": config.model_type,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "intermediate": intermediate_of(config.model_type, vars(config)),
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "vocabulary": config.vocab_size,
        "tied_embeddings": config.tie_word_embeddings,
        **bias_options(config.model_type, vars(config)),
        **expert_numbers(config.model_type, vars(config)),
    }


def _check_numbers(name: str, model: Model, config: Any) -> None:
    found, stated = model_numbers(config), model.shape.plain()
    problems = [
        f"models.{name}.shape.{key}: the config says {stated[key]}, the model has {found[key]}"
        for key in stated
        if stated[key] != found[key]
    ]
    if problems:
        raise RankwiseError(
            _listing("the model is not the one that the config describes; correct one of them", problems)
        )


def _check_positions(name: str, model: Model, config: Any) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and model.max_length > positions:
        raise RankwiseError(
            f"models.{name}.max_length: {model.max_length} tokens, but the model reads at most {positions} "
            f"(`max_position_embeddings` of its config.json); write `max_length: {positions}` or less. Left out, it is "
            f"{Model.model_fields['max_length'].default}."
        )


def skeleton_of(config: Any) -> torch.nn.Module:
    """The model without memory for its weights, with the attention that `load_checkpoint` takes."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton: torch.nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return skeleton


def _check_linears(model: Model, skeleton: torch.nn.Module) -> None:
    modules = dict(skeleton.named_modules())
    problems = []
    for expected in linear_modules(model.shape):
        module, shape = modules.get(expected.name), (expected.out_features, expected.in_features)
        if not isinstance(module, torch.nn.Linear):
            problems.append(f"{expected.name}: no Linear layer, but {type(module).__name__}")
        elif tuple(module.weight.shape) != shape:
            problems.append(f"{expected.name}: {tuple(module.weight.shape)}, and `shape` gives {shape}")
        elif (module.bias is not None) != has_native_bias(model.shape, expected):
            problems.append(f"{expected.name}: {'with' if module.bias is not None else 'without'} a bias")
    if problems:
        raise RankwiseError(_listing("the model's Linear layers are not those of its family", problems))


def _check_weights(skeleton: torch.nn.Module, weights: list[Path], family: Family) -> None:
    """Every parameter is stored, in its shape, as finite floating point numbers; those of experts one by one.

    Nothing else is, but for what the model makes of others (a tied head, buffers) and what transformers passes over.
    """
    prefix = f"{getattr(skeleton, 'base_model_prefix', '')}."
    parameters = skeleton.named_parameters()
    wanted = {stored_name(name, family): tuple(parameter.shape) for name, parameter in parameters}
    beside = {stored_name(name, family) for name in skeleton.state_dict()}
    passed_over = _passed_over(skeleton)
    missing, problems, others = dict(wanted), [], []
    for file, name, tensor in _stored(weights):
        known = name if name in wanted else prefix + name  # a base model is stored without the prefix
        if known not in wanted:
            if not beside & {name, known, name.removeprefix(prefix)} and not passed_over.search(name):
                others.append(f"{file.name}: {name} is none of the model's weights; take it out of the file")
            continue
        missing.pop(known, None)
        if tuple(tensor.shape) != wanted[known]:
            problems.append(f"{file.name}: {name} is {tuple(tensor.shape)}, not {wanted[known]}")
        elif not tensor.is_floating_point():
            problems.append(f"{file.name}: {name} holds {tensor.dtype}; quantised weights are not supported")
        elif not bool(tensor.isfinite().all()):
            problems.append(f"{file.name}: {name} holds NaN or infinite values")
    problems += [f"{name} is not stored" for name in missing]
    problems += others  # last: if all names are others, those that are missing say more
    if problems:
        raise RankwiseError(_listing("the weights cannot be used; fetch or make the model again", problems))


def _passed_over(skeleton: Any) -> re.Pattern[str]:
    """Names of stored tensors for which the model has no place, and which transformers leaves out without a word."""
    patterns = set(skeleton._keys_to_ignore_on_load_unexpected or ())
    if any(name.endswith("rotary_emb.inv_freq") for name, _ in skeleton.named_buffers()):
        patterns.add(r"rotary_emb\.inv_freq")  # once a buffer of each block
    return re.compile("|".join(f"({pattern})" for pattern in sorted(patterns)) or "(?!)")


def _check_tied_head(name: str, skeleton: torch.nn.Module, weights: list[Path]) -> None:
    """A tied model has no head of its own: programs that open one differ in whether they use what is stored.

    A copy of the embedding is no such head.
    """
    from safetensors import safe_open

    head, embedding = _head_and_embedding(skeleton)
    prefix = f"{getattr(skeleton, 'base_model_prefix', '')}."
    files = _files_of(weights)
    if head not in files:
        return
    if embedding not in files:  # a base model is stored without the prefix
        embedding = embedding.removeprefix(prefix)
    with safe_open(files[head], framework="pt") as one, safe_open(files[embedding], framework="pt") as other:
        if _equal(one.get_slice(head), other.get_slice(embedding)):
            return
    raise RankwiseError(
        f"{files[head].name}: {head} is stored, and differs from {embedding}, although config.json says "
        "`tie_word_embeddings: true`. Which of them the model writes with depends on the program that opens it. If the "
        f"head is its own, write `tie_word_embeddings: false` there, and `models.{name}.shape.tied_embeddings: false` "
        f"in the config; else take {head} out of the file."
    )


def _head_and_embedding(skeleton: Any) -> tuple[str, str]:
    """Names of their weights."""
    names = {id(module): f"{name}.weight" for name, module in skeleton.named_modules()}
    return names[id(skeleton.get_output_embeddings())], names[id(skeleton.get_input_embeddings())]


def _files_of(weights: list[Path]) -> dict[str, Path]:
    """Each stored tensor's file."""
    from safetensors import safe_open

    files: dict[str, Path] = {}
    for file in weights:
        with safe_open(file, framework="pt") as tensors:
            files |= dict.fromkeys(tensors.keys(), file)
    return files


def _equal(one: Any, other: Any) -> bool:
    """Whether two stored tensors hold the same numbers, some rows at a time."""
    shape = one.get_shape()
    if shape != other.get_shape():
        return False
    rows = max(1, CHUNK // shape[1])
    return all(bool((one[i : i + rows] == other[i : i + rows]).all()) for i in range(0, shape[0], rows))


def _stored(weights: list[Path]) -> Iterator[tuple[Path, str, torch.Tensor]]:
    """Each stored tensor, one at a time."""
    from safetensors import SafetensorError, safe_open

    for file in weights:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - the handle cannot be iterated
                    yield file, name, tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise RankwiseError(
                f"{file.name}: truncated or damaged, no readable safetensors file ({error}). Fetch it again."
            ) from error


def _check_tokenizer(name: str, model: Model, folder: Path) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # ValueError, OSError, KeyError, ... by what is missing
        raise RankwiseError(f"its tokenizer cannot be loaded ({error}). Add the tokenizer's files.") from error
    numbers = tokenizer.get_vocab()
    beyond = {token for token, number in numbers.items() if number >= model.shape.vocabulary}
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    if ordinary := beyond - special:
        last = max(ordinary, key=lambda token: numbers[token])
        raise RankwiseError(
            f"models.{name}.shape.vocabulary: the tokenizer's token {last!r} has number {numbers[last]}, the model "
            f"only {model.shape.vocabulary} tokens, numbered from 0. They do not belong together."
        )
    if beyond:  # as for images, in text models of Gemma 3; or one for padding that was added later
        log.warning("the model has no embedding of %s; no text may hold them", ", ".join(sorted(beyond)))


def _listing(title: str, problems: list[str]) -> str:
    more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    shown = problems[:SHOWN]
    return "\n".join([f"{title}:", *(f"  {line}" for line in [*shown, *more])])
