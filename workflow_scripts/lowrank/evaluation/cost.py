"""What a model costs: parameters and multiply-accumulates from its shapes, memory and speed measured.

Conventions. A multiply-accumulate (MAC) is one multiplication and one addition, half of two "FLOPs". For T tokens:
a dense layer (or a shortcut of the residual stream) of m x n weights T m n, a pair of rank r T r (m + n), attention
2 T^2 heads head_dim a block (scores by the widths of q, values by those of v; the causal half is not taken off), the
head T V d. Of E experts a token passes k, so of each they are counted for T k / E tokens, as if the router were
balanced; the router itself T E d. Norms, rotations, biases and activations are not counted.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lowrank.config.sources import ModelShape
from lowrank.config.suites import CostSuite
from lowrank.errors import RankwiseError
from lowrank.model.devices import devices_of
from lowrank.model.families import LinearModule, expert_share, linear_modules, router_parameters
from lowrank.model.losses import head_of
from lowrank.model.modeling_rankwise import IdentityBlockLinear, LowRankLinear
from lowrank.model.parameters import shortcut_parameters
from lowrank.model.runtime import peak_memory_mib

log = logging.getLogger(__name__)

CountedLayer = nn.Linear | LowRankLinear | IdentityBlockLinear

CONVENTION = (
    "T m n a dense layer or shortcut, T r (m + n) a pair of rank r, 2 T^2 heads head_dim a block, T V d the head; of "
    "experts the share that a token passes"
)


def count_macs(model: PreTrainedModel, shape: ModelShape, tokens: int) -> dict[str, int]:
    """Multiply-accumulates of one forward pass over `tokens` tokens, by the conventions above."""
    modules = [(linear, _module(model, linear)) for linear in linear_modules(shape)]
    alone = sum(_weights(module) for linear, module in modules if linear.type.expert is None)
    experts = sum(_weights(module) for linear, module in modules if linear.type.expert is not None)
    passed = alone + shortcut_parameters(model) + router_parameters(shape) + expert_share(experts, shape)
    linears = tokens * passed
    scores = sum(module.out_features for linear, module in modules if linear.type.output == "query")
    values = sum(module.in_features for linear, module in modules if linear.type.input == "query")
    attention = tokens**2 * (scores + values)
    head = tokens * head_of(model).weight.numel()
    return {"total": linears + attention + head, "linears": linears, "attention": attention, "head": head}


def count_bytes(model: PreTrainedModel, folder: str | Path) -> dict[str, int]:
    """ "weight_bytes": the parameters in memory; "disk_bytes": the safetensors files of the checkpoint."""
    return {
        "weight_bytes": sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        "disk_bytes": sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")),
    }


def measure_speed(model: PreTrainedModel, suite: CostSuite) -> dict[str, Any]:
    """Time the model on random tokens: the prompt in one pass, then one token at a time with the KV cache.

    One warm-up run comes first; medians over `repeats` runs, tokens counted over the whole batch.

    Returns:
        "prefill_tokens_per_second", "decode_tokens_per_second", "repeats" (their raw values), "peak_mib": of this
        process from its start, loading included ("host"), and of its GPUs together during these runs ("cuda").
    """
    device, places = model.device, devices_of(model)
    for place in places:
        if place.type == "cuda":
            torch.cuda.reset_peak_memory_stats(place)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    prompt = torch.randint(vocabulary, (suite.batch_size, suite.prompt_tokens), generator=generator).to(device)
    runs = [_timed_run(model, prompt, suite.new_tokens) for _ in range(suite.repeats + 1)][1:]
    prefill, decode = (list(values) for values in zip(*runs, strict=True))
    log.info("prefill %.0f tokens/s, decode %.1f tokens/s", statistics.median(prefill), statistics.median(decode))
    return {
        "peak_mib": peak_memory_mib(places),
        "prefill_tokens_per_second": statistics.median(prefill),
        "decode_tokens_per_second": statistics.median(decode),
        "repeats": {"prefill_tokens_per_second": prefill, "decode_tokens_per_second": decode},
    }


@torch.inference_mode()
def _timed_run(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Tokens a second of the prompt and of greedy decoding after it."""

    def step(ids: torch.Tensor, cache: Any) -> Any:
        return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def decode() -> None:
        state = prefilled
        for _ in range(new_tokens):
            state = step(state.logits[:, -1:].argmax(dim=-1), state.past_key_values)

    places = devices_of(model)
    prefill_seconds, prefilled = _seconds(lambda: step(prompt, None), places)
    decode_seconds, _ = _seconds(decode, places)
    return prompt.numel() / prefill_seconds, len(prompt) * new_tokens / decode_seconds


def _seconds(work: Callable[[], Any], devices: Sequence[torch.device]) -> tuple[float, Any]:
    """Wall time of a call, the work of its devices included, and what it returned."""
    _wait(devices)
    started = time.perf_counter()
    result = work()
    _wait(devices)
    return time.perf_counter() - started, result


def _wait(devices: Sequence[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _module(model: PreTrainedModel, linear: LinearModule) -> CountedLayer:
    try:
        module = model.get_submodule(linear.name)
    except AttributeError as error:
        raise RankwiseError(f"the model has no layer {linear.name}; does `shape` in the config describe it?") from error
    if not isinstance(module, CountedLayer):
        raise RankwiseError(f"{linear.name} is a {type(module).__name__}, whose cost is not known")
    return module


def _weights(module: CountedLayer) -> int:
    """Weights of a layer without its bias: its multiply-accumulates for one token."""
    if isinstance(module, LowRankLinear):
        first = sum(factor.numel() for factor in module.down.parameters())  # a shared one runs here once more
        return int(first + module.up.weight.numel())
    if isinstance(module, IdentityBlockLinear):
        return int(module.down.weight.numel() + module.rest.weight.numel())
    return module.weight.numel()
