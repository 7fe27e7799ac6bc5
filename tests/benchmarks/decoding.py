"""Decoding with pairs and identity blocks against the dense model: transformers' loop; a captured graph on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import StaticCache

from lowrank.ranks.budget import Budget
from tests.benchmarks.layers import KEPT, identity_block, pair
from tests.benchmarks.measuring import Row, Setting, in_turns, put, random_model, ratios, row_of

PROMPT = 16
WARM_UP = 3
"""Steps before a capture, on a stream of their own."""
KINDS: dict[str, Callable[[torch.nn.Linear], torch.nn.Module] | None] = {
    "dense": None,
    "pairs": pair(KEPT),
    "identity blocks": identity_block(KEPT),
}
EAGER = {"pairs": 1.2, "identity blocks": 1.4}
"""Targets of transformers' loop on a GPU, where launches decide; with a graph and on a CPU it is 1."""


def rows(setting: Setting) -> list[Row]:
    """For each dtype and kind of layers the time of a new token against the dense model's."""
    return [row for dtype in setting.dtypes for row in _of_dtype(setting, dtype)]


def _of_dtype(setting: Setting, dtype: str) -> list[Row]:
    size = setting.size
    models = {name: _model(setting, dtype, name) for name in KINDS}
    prompt = torch.randint(size.vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(2)).to(setting.device)
    loops: dict[str, Callable[[], Any]] = {
        name: lambda model=model: decode(model, prompt, size.new_tokens) for name, model in models.items()
    }
    found = _against_dense("transformers' loop", in_turns(loops, size.turns, setting.device), dtype, setting)
    if setting.device == "cuda":
        graphs = {name: captured(model, prompt, size.new_tokens) for name, model in models.items()}
        found += _against_dense("captured graph", in_turns(graphs, size.turns, setting.device), dtype, setting)
    return found


def _against_dense(how: str, times: Mapping[str, Sequence[float]], dtype: str, setting: Setting) -> list[Row]:
    found = []
    for name, launched in EAGER.items():
        target = launched if setting.device == "cuda" and how != "captured graph" else 1.0
        found.append(row_of(f"decoding, {how}: {name} / dense", ratios(times, name, "dense"), dtype, target=target))
    return found


def _model(setting: Setting, dtype: str, kind: str) -> Any:
    """The same random model, its linear layers exchanged."""
    model, make = random_model(setting.size, dtype, setting.device), KINDS[kind]
    if make is not None:
        for module in Budget.of(setting.size.shape).modules:
            made = make(model.get_submodule(module.name))  # type: ignore[arg-type]
            put(model, module.name, made.to(device=setting.device, dtype=getattr(torch, dtype)).requires_grad_(False))
    return model.eval()


@torch.inference_mode()
def decode(model: Any, prompt: torch.Tensor, new_tokens: int) -> list[int]:
    """Greedy, by a cache that grows."""
    state = model(prompt, use_cache=True, logits_to_keep=1)
    found = []
    for _ in range(new_tokens):
        ids = state.logits[:, -1:].argmax(dim=-1)
        found.append(ids)
        state = model(ids, past_key_values=state.past_key_values, use_cache=True, logits_to_keep=1)
    return [int(ids) for ids in found]


class StaticStep:
    """Greedy decoding in buffers that stay where they are, so that a graph can be made of a step.

    Attributes:
        ids: the token that the next step reads, 1 x 1; a step puts its own choice there.
    """

    def __init__(self, model: Any, prompt: torch.Tensor, steps: int) -> None:
        self.model, self.prompt = model, prompt
        self.cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + steps)
        self.ids = torch.zeros(1, 1, dtype=torch.long, device=prompt.device)

    def begin(self) -> None:
        """Read the prompt anew."""
        self.cache.reset()
        self._read(self.prompt)

    def step(self) -> None:
        """One token more."""
        self._read(self.ids)

    def _read(self, ids: torch.Tensor) -> None:
        state = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.ids.copy_(state.logits[:, -1:].argmax(dim=-1))


@torch.inference_mode()
def captured(model: Any, prompt: torch.Tensor, new_tokens: int) -> Callable[[], None]:
    """Decoding of so many tokens by a CUDA graph of one step; the prompt is read outside of it."""
    static = StaticStep(model, prompt, new_tokens + WARM_UP)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        static.begin()
        for _ in range(WARM_UP):
            static.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static.step()

    @torch.inference_mode()
    def run() -> None:
        static.begin()
        for _ in range(new_tokens):
            graph.replay()

    return run
