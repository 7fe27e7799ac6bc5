"""Compressed tiny models of every make, and llama.cpp's graphs written out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from torch.nn.functional import embedding, linear, rms_norm, silu
from transformers import PreTrainedModel

from lowrank.compression.branches import Structure
from lowrank.compression.structured import cut
from lowrank.config.sources import ModelShape
from lowrank.model.checkpoint import family_of, replace_modules
from lowrank.model.factors import IdentityColumnsFactors, LowRankFactors, SharedDownFactors
from lowrank.model.replacements import IdentityBlockFactors, NarrowedHeads, Replacement, SmallerLinear
from lowrank.ranks.budget import Budget
from tests import tiny

IDS = torch.randint(2, 400, (2, 12), generator=torch.Generator().manual_seed(3))


def structure(kind: str) -> Structure:
    return Structure.of(Budget.of(ModelShape(**tiny.shape(kind))))


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def pairs(kind: str, identity_block: bool, bias: bool) -> PreTrainedModel:
    """Pairs in all layers but v; without new biases, those of the dense layers."""
    model, random = tiny.model(kind), draw()
    changes: dict[str, Replacement] = {}
    for module in structure(kind).budget.modules:
        if module.type.name == "v":
            continue
        m, n = module.out_features, module.in_features
        had = model.get_submodule(module.name).bias
        new = torch.randn(m, generator=random) / 8 if bias else had
        pair = LowRankFactors(torch.randn(8, n, generator=random) / 8, torch.randn(m, 8, generator=random) / 8, new)
        changes[module.name] = IdentityBlockFactors.of(pair, module.name) if identity_block else pair
    replace_modules(model, changes)
    return model


def shared(kind: str) -> PreTrainedModel:
    """q, k and v share a first factor that has an identity block, the first matrices of the MLP a plain one."""
    model, parts, random = tiny.model(kind), structure(kind), draw()
    changes: dict[str, Replacement] = {}
    for layer in range(tiny.LAYERS):
        of_block = [module for module in parts.budget.modules if module.layer == layer]
        heads = [module for module in of_block if module.type.name in ("q", "k", "v")]
        neurons = [module for module in of_block if module.type in parts.mlp.writers]
        for owner, *followers in (heads, neurons):
            n, rank, ups = owner.in_features, 8, {}
            for module in (owner, *followers):
                ups[module.name] = torch.randn(module.out_features, rank, generator=random) / 8
            biases = {name: model.get_submodule(name).bias for name in ups}
            order = torch.randperm(n, generator=random).int()
            name, last = owner.name, (ups[owner.name], biases[owner.name])
            changes[name] = (
                IdentityColumnsFactors(order, torch.randn(rank, n - rank, generator=random) / 8, *last)
                if owner.type.name == "q"
                else LowRankFactors(torch.randn(rank, n, generator=random) / 8, *last)
            )
            for module in followers:
                changes[module.name] = SharedDownFactors(name, ups[module.name], biases[module.name])
    replace_modules(model, changes)
    return model


def pruned(kind: str, groups: tuple[int, int], neurons: tuple[int, int], bias: bool = False) -> PreTrainedModel:
    """Key/value heads and neurons of the two blocks; with `bias`, the last matrix of each MLP has one."""
    model, parts = tiny.model(kind), structure(kind)
    kept = {}
    for layer in range(tiny.LAYERS):
        kept[layer, "attention"] = torch.arange(parts.attention.units)[-groups[layer] :]
        kept[layer, "mlp"] = torch.arange(tiny.INTERMEDIATE)[-neurons[layer] :]
    changes = dict(cut(model, parts, kept))
    if bias:
        for layer in range(tiny.LAYERS):
            name, random = parts.layer_name(layer, parts.mlp.reader), draw()
            weight = changes[name].weight  # type: ignore[union-attr]
            changes[name] = SmallerLinear(weight, torch.randn(tiny.HIDDEN, generator=random))
    replace_modules(model, changes)
    return model


def narrow(kind: str) -> PreTrainedModel:
    """Heads of 12 of 16 dimensions of q and k (all where heads are normed), 10 of v; rotary pairs differ by head."""
    model, parts, random = tiny.model(kind), structure(kind), draw()
    family, shape = family_of(model), parts.budget.dimensions
    whole = family.normed != "nothing" or family.rotary == "part"
    changes: dict[str, Replacement] = {}
    for layer in range(tiny.LAYERS):
        qk = shape.head_dim if whole else 12
        kept = torch.stack(
            [torch.randperm(8, generator=random)[: qk // 2].sort().values for _ in range(shape.kv_heads)]
        )
        widths = {"q": (shape.heads * qk, shape.hidden), "k": (shape.kv_heads * qk, shape.hidden)}
        widths |= {"v": (shape.kv_heads * 10, shape.hidden), "o": (shape.hidden, shape.heads * 10)}
        for each in family.types[:4]:
            name, (m, n) = parts.layer_name(layer, each), widths[each.name]
            had = model.get_submodule(name).bias
            bias = None if had is None else torch.randn(m, generator=random) / 8
            changes[name] = SmallerLinear(torch.randn(m, n, generator=random) / 8, bias)
        attention = name.rpartition(".")[0]
        pairs_go = bool(family.rotary) and not whole
        changes[attention] = NarrowedHeads(shape.heads, shape.kv_heads, kept if pairs_go else None)
    replace_modules(model, changes)
    return model


MAKES: dict[str, Any] = {
    "dense": tiny.model,
    "pairs": lambda kind: pairs(kind, identity_block=False, bias=False),
    "identity blocks": lambda kind: pairs(kind, identity_block=True, bias=False),
    "biased pairs": lambda kind: pairs(kind, identity_block=True, bias=True),
    "shared factors": shared,
    "one width": lambda kind: pruned(kind, (4, 4), (96, 96)),
    "one width, biased": lambda kind: pruned(kind, (4, 4), (96, 96), bias=True),
    "own widths": lambda kind: pruned(kind, (1, 2), (96, 40)),
    "narrow heads": narrow,
}
ADD_BIAS = ("biased pairs", "one width, biased")


class Graph:
    """llama.cpp's graphs of `llama`, `deci`, `qwen2` and `qwen3`, from what a GGUF file says (`src/models/*.cpp`)."""

    def __init__(self, file: Path) -> None:
        reader = gguf.GGUFReader(file)
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors = {tensor.name: self._values(tensor) for tensor in reader.tensors}
        self.architecture = self.fields["general.architecture"]
        self.read: set[str] = set()

    @staticmethod
    def _values(tensor: gguf.ReaderTensor) -> torch.Tensor:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(values.copy()).reshape(*reversed(tensor.shape.tolist()))

    def number(self, key: str, layer: int = 0) -> Any:
        found = self.fields[f"{self.architecture}.{key}"]
        return found[layer] if isinstance(found, list) else found

    def tensor(self, name: str) -> torch.Tensor | None:
        self.read.add(name)
        return self.tensors.get(name)

    def linear(self, name: str, x: torch.Tensor, bias: bool) -> torch.Tensor:
        return linear(x, self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias") if bias else None)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        gain = self.tensor(f"{name}.weight")
        return x if gain is None else rms_norm(x, (x.shape[-1],), gain, self.number("attention.layer_norm_rms_epsilon"))

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate (tokens, heads, head_dim): neighbours in Llama's graphs, halves in Qwen's."""
        width = self.number("rope.dimension_count")
        angles = torch.arange(len(x))[:, None] * self.number("rope.freq_base") ** -(torch.arange(0, width, 2) / width)
        factors = self.tensor("rope_freqs.weight")
        angles = (angles if factors is None else angles / factors)[:, None]
        neighbours = self.architecture in ("llama", "deci")
        first, second = (x[..., ::2], x[..., 1::2]) if neighbours else (x[..., : width // 2], x[..., width // 2 :])
        turned = first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos()
        return torch.stack(turned, -1).flatten(-2) if neighbours else torch.cat(turned, -1)

    def attention(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        first = layer if self.architecture == "deci" else 0
        heads, groups = self.number("attention.head_count", first), self.number("attention.head_count_kv", first)
        bias, width = self.architecture != "qwen3", self.number("attention.key_length")
        q, k, v = (
            self.linear(f"blk.{layer}.attn_{name}", x, bias).unflatten(-1, (count, width))
            for name, count in (("q", heads), ("k", groups), ("v", groups))
        )
        if self.architecture == "qwen3":
            q, k = self.norm(f"blk.{layer}.attn_q_norm", q), self.norm(f"blk.{layer}.attn_k_norm", k)
        q, k = self.rotated(q), self.rotated(k)
        k, v = (states.repeat_interleave(heads // groups, dim=1) for states in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / width**0.5
        scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), float("-inf"))
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        return self.linear(f"blk.{layer}.attn_output", mixed, self.architecture in ("llama", "deci"))

    def mlp(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        bias = self.architecture in ("llama", "deci")
        gate, up = (self.linear(f"blk.{layer}.ffn_{name}", x, bias) for name in ("gate", "up"))
        first = layer if self.architecture == "deci" else 0
        assert up.shape[-1] == self.number("feed_forward_length", first)
        return self.linear(f"blk.{layer}.ffn_down", silu(gate) * up, bias)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Of one text: tokens x vocabulary; all tensors of the file are read."""
        words = self.tensor("token_embd.weight")
        x = embedding(ids, words)
        for layer in range(self.number("block_count")):
            x = x + self.attention(layer, self.norm(f"blk.{layer}.attn_norm", x))
            x = x + self.mlp(layer, self.norm(f"blk.{layer}.ffn_norm", x))
        head = self.tensor("output.weight")
        found = linear(self.norm("output_norm", x), words if head is None else head)
        assert set(self.tensors) <= self.read, "a tensor that the graph does not read"
        return found


def cases(without: Iterator[str] | tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """Every make on every family, but for fewer heads where all of them are normed at once."""
    fewer_heads = ("one width", "one width, biased", "own widths")
    found = [(make, kind) for make in MAKES for kind in tiny.SHAPES if kind not in without]
    return [case for case in found if case not in {(make, "olmo2") for make in fewer_heads}]
