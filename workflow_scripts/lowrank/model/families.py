"""The architectures that can be compressed: which linear layers a block has, what each reads, what is tied.

All that statistics, bases, budgets and searches know of a family is its entry in `FAMILIES`. To add one, add an entry;
let configs name it (`ModelShape.family`); and give it the classes of its checkpoints (`modeling_rankwise.py`).
`tests/unit/model/test_families.py` fails until all three are there, with a model to test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


class Dimensions(Protocol):
    """The numbers of a model's configuration that decide the shapes of its linear layers."""

    @property
    def family(self) -> str: ...

    @property
    def layers(self) -> int: ...

    @property
    def hidden(self) -> int: ...

    @property
    def intermediate(self) -> int: ...

    @property
    def heads(self) -> int: ...

    @property
    def kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...


@dataclass(frozen=True)
class LinearType:
    """One type of linear layer of a block, in the order of the forward pass.

    Attributes:
        name: short name, used in configs, tables and figures (`q`, `gate`, ...).
        path: module path inside a block.
        output: name of the output dimension (`hidden`, `query`, `key_value`, `intermediate`).
        input: name of the input dimension.
        site: name of the input that it reads; types with one site share their input statistics.
        tied: name of the search variable; types with the same name share a kept ratio.
    """

    name: str
    path: str
    output: str
    input: str
    site: str
    tied: str


@dataclass(frozen=True)
class Family:
    """A model family, named by the `model_type` of transformers.

    Attributes:
        blocks: path of the list of decoder blocks inside the causal language model.
        decoder: path of the base model (without the head).
        types: the linear layers of a block.
        biased: names of the types whose dense layers have a bias.
        rotary: whether q and k are rotated by position, dimension i of a head with dimension i + head_dim / 2.
        normed_heads: whether q and k are normed head by head, each dimension by all of its head.
    """

    model_type: str
    blocks: str
    decoder: str
    types: tuple[LinearType, ...]
    biased: tuple[str, ...] = ()
    rotary: bool = True
    normed_heads: bool = False

    @property
    def sites(self) -> dict[str, LinearType]:
        """Input site -> the first type that reads it."""
        first: dict[str, LinearType] = {}
        for linear in self.types:
            first.setdefault(linear.site, linear)
        return first


_ATTENTION = (
    LinearType("q", "self_attn.q_proj", "query", "hidden", "attention", "qk"),
    LinearType("k", "self_attn.k_proj", "key_value", "hidden", "attention", "qk"),
    LinearType("v", "self_attn.v_proj", "key_value", "hidden", "attention", "v"),
)
_LLAMA_TYPES = (
    *_ATTENTION,
    LinearType("o", "self_attn.o_proj", "hidden", "query", "attention_output", "o"),
    LinearType("gate", "mlp.gate_proj", "intermediate", "hidden", "mlp", "gate"),
    LinearType("up", "mlp.up_proj", "intermediate", "hidden", "mlp", "up"),
    LinearType("down", "mlp.down_proj", "hidden", "intermediate", "mlp_output", "down"),
)
_OPT_TYPES = (
    *_ATTENTION,
    LinearType("o", "self_attn.out_proj", "hidden", "query", "attention_output", "o"),
    LinearType("fc1", "fc1", "intermediate", "hidden", "mlp", "fc1"),
    LinearType("fc2", "fc2", "hidden", "intermediate", "mlp_output", "fc2"),
)

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "model.layers", "model", _LLAMA_TYPES),
        Family("mistral", "model.layers", "model", _LLAMA_TYPES),
        Family("qwen2", "model.layers", "model", _LLAMA_TYPES, biased=("q", "k", "v")),
        Family("qwen3", "model.layers", "model", _LLAMA_TYPES, normed_heads=True),
        Family(
            "opt",
            "model.decoder.layers",
            "model.decoder",
            _OPT_TYPES,
            biased=tuple(linear.name for linear in _OPT_TYPES),
            rotary=False,
        ),
    )
}


@dataclass(frozen=True)
class LinearModule:
    """One linear layer of one block of a model.

    Attributes:
        name: full module path in the causal language model.
        layer: index of the block.
        type: its type.
        out_features: m.
        in_features: n.
    """

    name: str
    layer: int
    type: LinearType
    out_features: int
    in_features: int

    @property
    def parameters(self) -> int:
        """Weights of the dense layer, m n; biases belong to the rest of the model."""
        return self.out_features * self.in_features


def linear_modules(dimensions: Dimensions) -> Iterator[LinearModule]:
    """All linear layers of a model's blocks, block by block, from its dimensions alone."""
    family = FAMILIES[dimensions.family]
    sizes = {
        "hidden": dimensions.hidden,
        "intermediate": dimensions.intermediate,
        "query": dimensions.heads * dimensions.head_dim,
        "key_value": dimensions.kv_heads * dimensions.head_dim,
    }
    for layer in range(dimensions.layers):
        for linear in family.types:
            name = f"{family.blocks}.{layer}.{linear.path}"
            yield LinearModule(name, layer, linear, sizes[linear.output], sizes[linear.input])


def has_native_bias(dimensions: Dimensions, module: LinearModule) -> bool:
    """Whether the dense layer of this family has a bias already."""
    return module.type.name in FAMILIES[dimensions.family].biased
