"""The architectures that can be compressed: which linear layers a block has, what each reads, what is tied.

All that statistics, bases, budgets and searches know of a family is its entry in `FAMILIES`. To add one, add an entry;
let configs name it (`ModelShape.family`); and give it the classes of its checkpoints (`modeling_rankwise.py`).
`tests/unit/model/test_families.py` fails until all three are there, with a model to test.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, Protocol


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

    @property
    def attention_bias(self) -> bool: ...

    @property
    def mlp_bias(self) -> bool: ...

    @property
    def experts(self) -> int: ...

    @property
    def experts_per_token(self) -> int: ...


@dataclass(frozen=True)
class LinearType:
    """One type of linear layer of a block, in the order of the forward pass.

    Attributes:
        name: short name, used in configs, tables and figures (`q`, `gate`, ...); all experts of a block share it.
        path: module path inside a block; in `FAMILIES`, `{}` stands for the index of an expert.
        output: name of the output dimension (`hidden`, `query`, `key_value`, `intermediate`).
        input: name of the input dimension.
        site: name of the input that it reads; types with one site share their input statistics.
        tied: name of the search variable; types with the same name share a kept ratio.
        expert: index of the expert that it belongs to; None for layers that all tokens pass, and in `FAMILIES`.
    """

    name: str
    path: str
    output: str
    input: str
    site: str
    tied: str
    expert: int | None = None

    @property
    def key(self) -> str:
        """What tells it from all others of its block, in files too: `gate`, or of an expert `gate.3`."""
        return self.name if self.expert is None else f"{self.name}.{self.expert}"

    def of_expert(self, index: int) -> LinearType:
        """The type of one expert, which reads the tokens that are routed to it."""
        return replace(self, path=self.path.format(index), site=f"{self.site}.{index}", expert=index)


@dataclass(frozen=True)
class Family:
    """A model family, named by the `model_type` of transformers.

    Attributes:
        blocks: path of the list of decoder blocks inside the causal language model.
        decoder: path of the base model (without the head).
        types: the linear layers of a block.
        biased: names of the types whose dense layers always have a bias.
        bias_options: which options of a configuration give more of them one, see `BIAS_OPTIONS`.
        rotary: whether q and k are rotated by position, dimension i of a head with dimension i + head_dim / 2; `part`:
            some models of the family rotate only the first dimensions of a head.
        fused: path of a layer inside a block, as stored -> types that it holds one after another. In memory, and in
            checkpoints of compressed models, each has a layer of its own (`modeling_rankwise.separate_projections`).
        normed: over what queries and keys are normed before they meet: nothing, each head, or all heads at once.
        norms: norms of the residual stream's width in a block.
        layer_norm: whether they are LayerNorms, with a shift; else root mean square norms.
        plain_branches: whether a branch reads the residual stream through one root mean square norm and writes
            straight to it, as in Llama.
        experts: path of a block's list of experts, in place of one MLP. Beside it, in `FAMILIES`, the types of an
            expert are those with `{}` in their path. As with `fused`, each matrix has a layer of its own in memory.
        stored: part of a parameter's name -> what checkpoints of the base architecture have instead.
        needs_bos: whether its models predict badly whatever follows no BOS token, so that each window begins with one.
    """

    model_type: str
    blocks: str
    decoder: str
    types: tuple[LinearType, ...]
    biased: tuple[str, ...] = ()
    bias_options: tuple[str, ...] = ()
    rotary: bool | Literal["part"] = True
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    normed: Literal["nothing", "heads", "projections"] = "nothing"
    norms: int = 2
    layer_norm: bool = False
    plain_branches: bool = True
    experts: str = ""
    stored: Mapping[str, str] = field(default_factory=dict)
    needs_bos: bool = False

    def with_experts(self, count: int) -> Family:
        """The family with types for each of so many experts, one expert after another, in place of those for all."""
        alone = tuple(linear for linear in self.types if "{}" not in linear.path)
        each = tuple(linear for linear in self.types if "{}" in linear.path)
        own = tuple(linear.of_expert(index) for index in range(count) for linear in each)
        return replace(self, types=(*alone, *own))

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
_EXPERT_TYPES = (
    *_LLAMA_TYPES[:4],
    LinearType("gate", "mlp.experts.{}.gate_proj", "intermediate", "hidden", "mlp", "gate"),
    LinearType("up", "mlp.experts.{}.up_proj", "intermediate", "hidden", "mlp", "up"),
    LinearType("down", "mlp.experts.{}.down_proj", "hidden", "intermediate", "mlp_output", "down"),
)
_MIXTRAL_STORED = {
    ".mlp.": ".block_sparse_moe.",
    ".gate_proj.": ".w1.",
    ".up_proj.": ".w3.",
    ".down_proj.": ".w2.",
}
_PHI3_FUSED = {"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")}
_OPT_TYPES = (
    *_ATTENTION,
    LinearType("o", "self_attn.out_proj", "hidden", "query", "attention_output", "o"),
    LinearType("fc1", "fc1", "intermediate", "hidden", "mlp", "fc1"),
    LinearType("fc2", "fc2", "hidden", "intermediate", "mlp_output", "fc2"),
)

_SIMILAR = 0.5
"""How much two names of families have in common that is worth telling (difflib)."""

BIAS_OPTIONS = {"attention_bias": ("q", "k", "v", "o"), "mlp_bias": ("gate", "up", "down")}
"""Options of a configuration, named as transformers names them -> types that have a bias where they are set."""

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "model.layers", "model", _LLAMA_TYPES, bias_options=("attention_bias", "mlp_bias")),
        Family("mistral", "model.layers", "model", _LLAMA_TYPES),
        Family("qwen2", "model.layers", "model", _LLAMA_TYPES, biased=("q", "k", "v")),
        Family("qwen3", "model.layers", "model", _LLAMA_TYPES, bias_options=("attention_bias",), normed="heads"),
        Family(
            "olmo2",
            "model.layers",
            "model",
            _LLAMA_TYPES,
            bias_options=("attention_bias",),
            normed="projections",
            plain_branches=False,
        ),
        Family(
            "gemma3_text",
            "model.layers",
            "model",
            _LLAMA_TYPES,
            bias_options=("attention_bias",),
            normed="heads",
            norms=4,
            plain_branches=False,
            needs_bos=True,
        ),
        Family("phi3", "model.layers", "model", _LLAMA_TYPES, rotary="part", fused=_PHI3_FUSED),
        Family(
            "qwen3_moe",
            "model.layers",
            "model",
            _EXPERT_TYPES,
            bias_options=("attention_bias",),
            normed="heads",
            experts="mlp.experts",
        ),
        Family("mixtral", "model.layers", "model", _EXPERT_TYPES, experts="mlp.experts", stored=_MIXTRAL_STORED),
        Family(
            "opt",
            "model.decoder.layers",
            "model.decoder",
            _OPT_TYPES,
            biased=tuple(linear.name for linear in _OPT_TYPES),
            rotary=False,
            layer_norm=True,
            plain_branches=False,
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


@cache
def _with_experts(family: str, experts: int) -> Family:
    return FAMILIES[family].with_experts(experts)


def family_with(name: str, experts: int) -> Family:
    """The entry of a family, with the types of each of a model's experts if it has any."""
    return _with_experts(name, experts) if FAMILIES[name].experts else FAMILIES[name]


def family_for(dimensions: Dimensions) -> Family:
    """The family of a model, with the types of each of its experts."""
    return family_with(dimensions.family, dimensions.experts)


def linear_modules(dimensions: Dimensions) -> Iterator[LinearModule]:
    """All linear layers of a model's blocks, those of all experts, block by block, from its dimensions alone."""
    for layer in range(dimensions.layers):
        yield from linear_modules_of_block(dimensions, layer)


def linear_modules_of_block(dimensions: Dimensions, layer: int) -> tuple[LinearModule, ...]:
    """The linear layers of one block; those of the others have the same sizes."""
    query, key_value = dimensions.heads * dimensions.head_dim, dimensions.kv_heads * dimensions.head_dim
    sizes = (dimensions.hidden, dimensions.intermediate, query, key_value)
    return _modules_of_block(dimensions.family, dimensions.experts, sizes, layer)


@cache
def _modules_of_block(family: str, experts: int, widths: tuple[int, ...], layer: int) -> tuple[LinearModule, ...]:
    """Made once: the check of a config asks for them hundreds of times."""
    entry = family_with(family, experts)
    sizes = dict(zip(("hidden", "intermediate", "query", "key_value"), widths, strict=True))
    return tuple(
        LinearModule(f"{entry.blocks}.{layer}.{linear.path}", layer, linear, sizes[linear.output], sizes[linear.input])
        for linear in entry.types
    )


def unknown_family(config: Mapping[str, Any]) -> str:
    """What to say of a model whose architecture has no entry.

    Args:
        config: what its `config.json` holds.
    """
    kind, text = config.get("model_type"), config.get("text_config")
    known = f"known families: {', '.join(sorted(FAMILIES))}; docs/families.md says what an entry takes."
    if isinstance(text, Mapping):
        inner = text.get("model_type")
        found = "of a known family" if inner in FAMILIES else "of no known family either"
        return (
            f"its architecture (`model_type: {kind}`) has other parts beside a text model. That was found "
            f"(`text_config`, `model_type: {inner}`), {found}, but is not taken out of the whole; save it as a model "
            f"of its own; {known}"
        )
    return f"its architecture (`model_type: {kind}`) is unknown here; the nearest family is {_nearest(config)}; {known}"


def _nearest(config: Mapping[str, Any]) -> str:
    """The family with the most similar name, or else the most similar options."""
    if named := get_close_matches(str(config.get("model_type")), FAMILIES, n=1, cutoff=_SIMILAR):
        return named[0]
    return "llama" if "rms_norm_eps" in config else "opt"


def has_native_bias(dimensions: Dimensions, module: LinearModule) -> bool:
    """Whether the dense layer has a bias already: all of its family have one, or this model has."""
    name = module.type.name
    given = [option for option, types in BIAS_OPTIONS.items() if name in types and getattr(dimensions, option)]
    return name in FAMILIES[dimensions.family].biased or bool(given)


def norm_parameters(dimensions: Dimensions) -> int:
    """Parameters of all norms of a model: in its blocks, and the one before the head."""
    family = FAMILIES[dimensions.family]
    width = dimensions.hidden * (2 if family.layer_norm else 1)
    query_key = {"nothing": 0, "heads": 2, "projections": dimensions.heads + dimensions.kv_heads}[family.normed]
    return dimensions.layers * (family.norms * width + query_key * dimensions.head_dim) + width


def router_parameters(dimensions: Dimensions) -> int:
    """Weights of what routes tokens to experts, in all blocks."""
    return dimensions.layers * dimensions.experts * dimensions.hidden


def expert_share(weights: int, dimensions: Dimensions) -> int:
    """Of so many weights of all experts those that a token passes, on average if the router is balanced."""
    return weights * dimensions.experts_per_token // dimensions.experts if dimensions.experts else 0


def bias_parameters(dimensions: Dimensions) -> int:
    """Biases of all linear layers of a dense model's blocks."""
    block = linear_modules_of_block(dimensions, 0)
    return dimensions.layers * sum(module.out_features for module in block if has_native_bias(dimensions, module))
