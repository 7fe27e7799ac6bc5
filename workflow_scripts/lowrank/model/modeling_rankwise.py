"""Models whose modules may be smaller than those of their architecture, as their recipe says.

This file is copied into every compressed checkpoint, so it needs nothing but torch and transformers:
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` opens the checkpoint anywhere.

The recipe in `config.json` maps module names to what each became:

    "model.layers.0.mlp.up_proj":
        {"kind": "low_rank", "in_features": 576, "out_features": 1536, "rank": 312, "bias": true}
    "model.layers.0.mlp.down_proj":
        {"kind": "identity_block", "in_features": 1536, "out_features": 576, "rank": 400, "bias": true}
    "model.layers.1.mlp.gate_proj":
        {"kind": "identity_columns", "in_features": 576, "out_features": 1536, "rank": 400, "bias": false}
    "model.layers.1.mlp.up_proj":
        {"kind": "shared_down", "in_features": 576, "out_features": 1536, "rank": 400, "bias": false,
         "shares": "model.layers.1.mlp.gate_proj"}
    "model.layers.0.mlp.gate_proj": {"kind": "linear", "in_features": 576, "out_features": 1200, "bias": false}
    "model.layers.0.self_attn": {"kind": "heads", "heads": 6, "kv_heads": 2}
    "model.layers.1.self_attn": {"kind": "narrow_heads", "heads": 9, "kv_heads": 3, "pairs": 24}
    "model.layers.0.mlp.experts.3.up_proj":
        {"kind": "low_rank", "in_features": 2048, "out_features": 768, "rank": 400, "bias": true}
    "model.layers.0.input_layernorm": {"kind": "rms_norm", "divisor": 576, "eps": 1e-05}
    "model.layers.0": {"kind": "shortcuts", "attention": [576, 480], "mlp": [480, 480]}

Modules that it does not name are those of the base architecture. A pair without features, as older recipes have it, has
those of the layer that it replaces.
"""

from typing import Any

import torch
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma3TextModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralModel,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo2Model,
    OPTConfig,
    OPTForCausalLM,
    OPTModel,
    Phi3Config,
    Phi3ForCausalLM,
    Phi3Model,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward, rotate_half


def features_of(layer: Any) -> dict[str, int]:
    """The widths of a linear layer, as its recipe has them."""
    return {"in_features": layer.in_features, "out_features": layer.out_features}


class LowRankLinear(nn.Module):
    """A linear layer of rank r: `y = up(down(x)) + bias`, with `down` (r x n) applied first and `up` (m x r)."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.down: nn.Module = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    def expand(self, z: torch.Tensor) -> torch.Tensor:
        """What follows `down`: (..., rank) to (..., out_features)."""
        y: torch.Tensor = self.up(z)
        return y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return self.expand(self.down(x))

    def recipe_entry(self) -> dict[str, Any]:
        """What the recipe says of this layer."""
        return {"kind": "low_rank", **features_of(self), "rank": self.rank, "bias": self.up.bias is not None}


class IdentityColumns(nn.Module):
    """A first factor with an r x r identity block: `z = x_1 + rest(x_2)`, so r (n - r) weights, not r n.

    `order` is a permutation of the n inputs: its first r are x_1, the others x_2.
    """

    order: torch.Tensor

    def __init__(self, in_features: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.rest = nn.Linear(in_features - rank, rank, bias=False)
        self.register_buffer("order", torch.arange(in_features, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., n) to (..., rank)."""
        first, others = x.index_select(-1, self.order).tensor_split([self.rank], dim=-1)
        z: torch.Tensor = first + self.rest(others)
        return z


class IdentityColumnsLinear(LowRankLinear):
    """A linear layer of rank r whose first factor has an identity block: r (m + n - r) weights."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__(in_features, out_features, rank, bias)
        self.down = IdentityColumns(in_features, rank)

    def recipe_entry(self) -> dict[str, Any]:
        """What the recipe says of this layer."""
        return {**super().recipe_entry(), "kind": "identity_columns"}


class SharedDownLinear(LowRankLinear):
    """A low-rank layer that has its own `up` alone; its first factor is that of another layer, which stores it.

    The product with that factor is computed here again, also where both layers read the same inputs.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool, shares: str, owner: LowRankLinear
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.up = nn.Linear(rank, out_features, bias=bias)
        self.shares = shares
        self._owner = (owner,)  # in a tuple, for a module would be stored here once more

    @property
    def down(self) -> nn.Module:  # type: ignore[override]
        """The first factor of the owner, with whatever has been put around it since."""
        return self._owner[0].down

    def recipe_entry(self) -> dict[str, Any]:
        """What the recipe says of this layer; `shares` is the full name of the owner."""
        return {**super().recipe_entry(), "kind": "shared_down", "shares": self.shares}


def _may_write(x: torch.Tensor, *layers: nn.Module) -> bool:
    """Whether layers without bias are mere products of `x`'s kind, whose results may be written into a given buffer.

    Not so where gradients are wanted, where a compiler traces (it plans its own buffers), under autocast, and where
    something has been put around a layer or its weight: adapters, hooks, quantisation, offloading, sharding.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return False
    return all(
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and layer.weight.dtype == x.dtype
        and layer.weight.device == x.device
        and "forward" not in vars(layer)
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        for layer in layers
    )


class IdentityBlockLinear(nn.Module):
    """A linear layer of rank r whose second factor has an r x r identity block: r (m + n - r) weights, not r (m + n).

    The outputs of the first factor, `z = down(x)` (r), are r of the m outputs; the others are `rest(z)`. `rows` says
    which outputs those r are, in increasing order; the others follow in theirs.

    On a GPU, where no gradient is wanted, both products go into one buffer, and one pass over it puts the outputs in
    order. The order is kept from when the layer is loaded; nothing in a forward pass waits for a device or has a shape
    that depends on data, so `torch.compile(fullgraph=True)`, `torch.export` and CUDA graphs take it.
    """

    rows: torch.Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.down = nn.Linear(in_features, rank, bias=False)
        self.rest = nn.Linear(rank, out_features - rank, bias=False)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.register_buffer("rows", torch.arange(rank, dtype=torch.int32))
        self._placed: tuple[torch.Tensor, int, torch.Tensor] | None = None

    def train(self, mode: bool = True) -> "IdentityBlockLinear":
        """As in any module; `from_pretrained` ends with it, so the order is computed here, before any forward pass."""
        super().train(mode)
        self._prepare()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "IdentityBlockLinear":
        placed = self._placed if self._is_placed() else None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if placed is not None and not self.rows.is_inference():  # the order goes to another device with the rows
            self._placed = self.rows, self.rows._version, fn(placed[2])
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._prepare()

    def _is_placed(self) -> bool:
        rows, placed = self.rows, self._placed
        if placed is None or placed[0] is not rows or rows.is_inference() or placed[1] != rows._version:
            return False
        return placed[2].device == rows.device  # `rows.data` may have been put elsewhere, which no version tells

    def _prepare(self) -> None:
        """Compute the order, if there are rows yet: memory that waits for them may hold anything."""
        rows = self.rows
        if self._is_placed() or type(rows) is not torch.Tensor or rows.is_meta:
            return
        if len(rows) and int(rows.min()) >= 0 and int(rows.max()) < self.out_features:
            self.places()

    def places(self) -> torch.Tensor:
        """For each output, its index among `z` followed by `rest(z)`: m, int64.

        It is computed once for given `rows`. After a change of `rows` in place, call this before compiling.
        """
        rows = self.rows
        if torch.compiler.is_compiling():
            return self._placed[2] if self._placed is not None and self._placed[0] is rows else self._places(rows)
        if rows.is_inference():  # such tensors do not say whether they changed
            return self._places(rows)
        if not self._is_placed():
            with torch.inference_mode(False):  # else a later backward pass could not keep them
                self._placed = rows, rows._version, self._places(rows)
        return self._placed[2]  # type: ignore[index]

    def _places(self, rows: torch.Tensor) -> torch.Tensor:
        """By counting, since lists of indices would have a length that depends on data."""
        first = torch.zeros(self.out_features, dtype=torch.long, device=rows.device).index_fill(0, rows.long(), 1)
        before = first.cumsum(0)  # how many outputs up to each are among `z`
        others = torch.arange(self.out_features, device=rows.device) - before + self.rank
        return torch.where(first == 1, before - 1, others)

    def _in_order(self, y: torch.Tensor) -> torch.Tensor:
        """From `z` followed by `rest(z)` to the outputs, (..., out_features), bias included."""
        places = self.places()
        on_cpu = y.device.type == "cpu"  # where `index_select` along rows takes up to three times as long
        y = y.gather(-1, places.expand(y.shape)) if on_cpu else y.index_select(-1, places)
        return y if self.bias is None else y + self.bias

    def expand(self, z: torch.Tensor) -> torch.Tensor:
        """What follows `down`: (..., rank) to (..., out_features)."""
        return self._in_order(torch.cat([z, self.rest(z)], dim=-1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if x.device.type == "cpu" or not _may_write(x, self.down, self.rest):  # on a CPU nothing is saved by it
            return self.expand(self.down(x))
        return self._written(x)

    def _written(self, x: torch.Tensor) -> torch.Tensor:
        """The same by two products into one buffer: no copy to join them, and a launch less."""
        flat = x.reshape(-1, self.in_features)
        y = x.new_empty(len(flat), self.out_features)
        z = y[:, : self.rank]
        torch.mm(flat, self.down.weight.t(), out=z)
        torch.mm(z, self.rest.weight.t(), out=y[:, self.rank :])
        return self._in_order(y).view(*x.shape[:-1], self.out_features)

    def recipe_entry(self) -> dict[str, Any]:
        """What the recipe says of this layer."""
        return {"kind": "identity_block", **features_of(self), "rank": self.rank, "bias": self.bias is not None}


class ResizedLinear(nn.Linear):
    """A dense linear layer with fewer inputs or outputs than its architecture gives it, or with a bias it had not."""

    def recipe_entry(self) -> dict[str, Any]:
        """What the recipe says of this layer."""
        return {"kind": "linear", **features_of(self), "bias": self.bias is not None}


class GainFreeRMSNorm(nn.Module):
    """Root mean square norm without a gain; the mean is taken over `divisor` channels, however many there are."""

    def __init__(self, divisor: int, eps: float) -> None:
        super().__init__()
        self.divisor = divisor
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale (..., k) by the reciprocal root of its sum of squares over `divisor`, in float32."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).sum(-1, keepdim=True) / self.divisor + self.eps)).to(x.dtype)

    def recipe_entry(self) -> dict[str, Any]:
        """What the recipe says of this norm."""
        return {"kind": "rms_norm", "divisor": self.divisor, "eps": self.eps}


class FewerHeads:
    """Mixed into the class of an attention module that lost heads; widths of its layers are entries of their own."""

    kept_heads: tuple[int, int]

    def recipe_entry(self) -> dict[str, Any]:
        """What the recipe says of this attention module."""
        heads, kv_heads = self.kept_heads
        return {"kind": "heads", "heads": heads, "kv_heads": kv_heads}


class SeparateProjections:
    """Mixed into the class of an attention module: a forward pass over layers q, k and v, whatever their widths.

    All heads of a module have as many dimensions, q and k one number, v and o another; both follow from the widths of
    its layers. Where q and k lost rotary pairs, `pairs` (kv heads x pairs left, increasing) says which are left to a
    key/value head and the query heads that share it. A head's rows of q and k are the first dimensions of its pairs,
    then the second. Where only the first dimensions of a head are rotated, the others pass.
    """

    kept_heads: tuple[int, int]
    pairs: torch.Tensor | None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **arguments: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map (batch, tokens, d) to the same, and return the attention weights if the implementation has them."""
        own: Any = self
        heads, kv_heads = self.kept_heads
        query = self._normed("q_norm", own.q_proj(hidden_states), heads)
        key = self._normed("k_norm", own.k_proj(hidden_states), kv_heads)
        value = own.v_proj(hidden_states).unflatten(-1, (kv_heads, -1))
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        if position_embeddings is not None:
            tables = [self._of_pairs(table) for table in position_embeddings]
            query, key = (self._rotated(states, *tables) for states in (query, key))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, own.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(own.config._attn_implementation, eager_attention_forward)
        attended, weights = attend(
            own,
            query,
            key,
            value,
            attention_mask,
            dropout=own.config.attention_dropout if own.training else 0.0,
            scaling=own.scaling,
            sliding_window=getattr(own, "sliding_window", getattr(own.config, "sliding_window", None)),
            **arguments,
        )
        out = own.o_proj if hasattr(own, "o_proj") else own.out_proj
        return out(attended.flatten(2)), weights

    def _normed(self, norm: str, states: Any, heads: int) -> Any:
        """Queries or keys by head, normed over what their norm has gains for: all heads at once (OLMo 2), or each."""
        module: Any = getattr(self, norm, None)
        if module is not None and module.weight.numel() == states.shape[-1]:
            states, module = module(states), None
        states = states.unflatten(-1, (heads, -1))
        return states if module is None else module(states)

    def _of_pairs(self, table: Any) -> Any:
        """Cosines or sines (batch, tokens, head_dim) of what is left: (batch, kv heads or 1, 1, tokens, width)."""
        if self.pairs is None:
            return table[:, None, None]
        kept = table.index_select(-1, self.pairs.flatten()).unflatten(-1, self.pairs.shape).transpose(1, 2)
        return torch.cat([kept, kept], dim=-1)[:, :, None]

    def _rotated(self, states: Any, cosines: torch.Tensor, sines: torch.Tensor) -> Any:
        """Rotate (batch, heads, tokens, width), the heads of each group by its own angles."""
        grouped = states.unflatten(1, (self.kept_heads[1], -1))
        turned, others = grouped[..., : cosines.shape[-1]], grouped[..., cosines.shape[-1] :]
        turned = (turned * cosines + rotate_half(turned) * sines).to(states.dtype)
        return torch.cat([turned, others], dim=-1).flatten(1, 2)


class NarrowHeads(SeparateProjections, FewerHeads):
    """Mixed into the class of an attention module whose heads have fewer dimensions than its architecture says."""

    def recipe_entry(self) -> dict[str, Any]:
        """What the recipe says of this attention module."""
        pairs = None if self.pairs is None else self.pairs.shape[1]
        return {**super().recipe_entry(), "kind": "narrow_heads", "pairs": pairs}


class SeparateGate:
    """Mixed into the class of an MLP whose gate and other projection were one layer: a forward pass over two."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (..., d) to the same."""
        own: Any = self
        fed: torch.Tensor = own.down_proj(own.activation_fn(own.gate_proj(hidden_states)) * own.up_proj(hidden_states))
        return fed


class Expert(nn.Module):
    """An expert of a block: a gated MLP with a layer for each matrix, which may be anything that maps as one does."""

    def __init__(self, hidden: int, intermediate: int, activation: nn.Module, **like: Any) -> None:
        super().__init__()
        self.gate_proj: nn.Module = nn.Linear(hidden, intermediate, bias=False, **like)
        self.up_proj: nn.Module = nn.Linear(hidden, intermediate, bias=False, **like)
        self.down_proj: nn.Module = nn.Linear(intermediate, hidden, bias=False, **like)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (tokens, d) to the same."""
        fed: torch.Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return fed


class SeparateExperts(nn.ModuleList):
    """The experts of a block, one after another, in place of the stacked matrices of transformers.

    The router is left alone: it hands over the experts of each token and their weights, and waits for the sum.
    """

    @classmethod
    def of(cls, stacked: Any) -> "SeparateExperts":
        """Copies of stacked matrices: `gate_up_proj` (experts x 2 intermediate x d), `down_proj` (the other way)."""
        both, down = stacked.gate_up_proj, stacked.down_proj
        sizes = {"hidden": down.shape[1], "intermediate": down.shape[2], "dtype": both.dtype}
        experts = cls(Expert(**sizes, activation=stacked.act_fn, device="meta") for _ in range(len(both)))
        experts.to_empty(device=both.device)
        expert: Any
        for index, expert in enumerate(experts):
            gate, up = both[index].detach().chunk(2)
            for layer, weight in ((expert.gate_proj, gate), (expert.up_proj, up), (expert.down_proj, down[index])):
                layer.weight.data.copy_(weight.detach())
        return experts.requires_grad_(both.requires_grad).train(stacked.training)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of what each token's experts make of it.

        An expert gets its tokens in their order. One without any is called where gradients are wanted, or where its
        weights are divided among processes: they are gathered by all of them or by none.

        Args:
            hidden_states: tokens x d.
            top_k_index: tokens x k, the experts of each token, all different.
            top_k_weights: tokens x k.

        Returns:
            tokens x d.
        """
        summed = torch.zeros_like(hidden_states)
        order: Any = top_k_index.flatten().argsort(stable=True)
        counts = top_k_index.flatten().bincount(minlength=len(self)).tolist()
        for expert, places in zip(self, order.split(counts), strict=True):
            if len(places) or torch.is_grad_enabled() or _is_divided(expert):
                tokens = places // top_k_index.shape[1]
                fed = expert(hidden_states[tokens]) * top_k_weights.flatten()[places, None]
                summed.index_add_(0, tokens, fed.to(summed.dtype))
        return summed


def _is_divided(module: nn.Module) -> bool:
    """Whether ZeRO's third stage has divided the weights, which it numbers, among processes."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


class Shortcuts:
    """Mixed into the class of a block whose residual stream changes its basis: `x S + attention(norm(x))`, and so on.

    The block's two branches and their norms are those of the Llama architecture and its relatives.
    """

    attention_shortcut: nn.Linear
    mlp_shortcut: nn.Linear
    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Map (batch, tokens, k) to (batch, tokens, k'), with each residual in the basis of its branch."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **arguments)
        hidden_states = self.attention_shortcut(hidden_states) + attended
        fed = self.mlp(self.post_attention_layernorm(hidden_states))
        result: torch.Tensor = self.mlp_shortcut(hidden_states) + fed
        return result

    def recipe_entry(self) -> dict[str, Any]:
        """What the recipe says of this block."""
        attention, mlp = self.attention_shortcut, self.mlp_shortcut
        return {
            "kind": "shortcuts",
            "attention": [attention.in_features, attention.out_features],
            "mlp": [mlp.in_features, mlp.out_features],
        }


def mix_in(module: nn.Module, mixin: type, name: str | None = None) -> None:
    """Give one module a class that is `mixin` before its own; by default of both their names."""
    if not isinstance(module, mixin):
        own = type(module)
        module.__class__ = type(name or f"{mixin.__name__}{own.__name__}", (mixin, own), {})


def set_heads(attention: Any, heads: int, kv_heads: int) -> None:
    """Tell an attention module how many heads its layers have now.

    Raises:
        ValueError: fewer heads, where one norm stands over all of them.
    """
    norm = getattr(attention, "q_norm", None)
    if norm is not None and norm.weight.numel() != attention.head_dim:
        raise ValueError("heads cannot go where q and k are normed over all heads at once")
    mix_in(attention, FewerHeads)
    attention.kept_heads = (heads, kv_heads)
    present = {"num_heads": heads, "num_key_value_heads": kv_heads, "num_key_value_groups": heads // kv_heads}
    for name, value in present.items():
        if hasattr(attention, name):
            setattr(attention, name, value)


def set_narrow_heads(attention: Any, heads: int, kv_heads: int, pairs: int | None) -> None:
    """Give an attention module a forward pass for heads of other widths, and room for which rotary pairs are left.

    Raises:
        ValueError: fewer pairs, where norms of whole heads stand between them and the products of q and k.
    """
    if pairs is not None and hasattr(attention, "q_norm"):
        raise ValueError("rotary pairs cannot go where q and k are normed")
    mix_in(attention, NarrowHeads)
    attention.kept_heads = (heads, kv_heads)
    attention.num_key_value_groups = heads // kv_heads
    room = None if pairs is None else torch.arange(pairs, dtype=torch.int32).repeat(kv_heads, 1)
    attention.register_buffer("pairs", room)


def set_shortcuts(block: Any, attention: nn.Linear, mlp: nn.Linear) -> None:
    """Put shortcuts into a block, whose class keeps its name: by that loaders know what they may not split."""
    mix_in(block, Shortcuts, type(block).__name__)
    block.attention_shortcut = attention
    block.mlp_shortcut = mlp


_MAKES: dict[tuple[Any, ...], type] = {}


def name_make(parent: nn.Module) -> None:
    """Give a module whose linear layers are not all plain a class of its own, one for each make.

    Servers look at the first instance of a class and then treat all others in the same way; vLLM joins `gate` and `up`
    of every `LlamaMLP` into one matrix if they are matrices in the first.
    """
    kinds = (LowRankLinear, IdentityBlockLinear)
    pairs = tuple((name, type(child)) for name, child in parent.named_children() if isinstance(child, kinds))
    if pairs and getattr(type(parent), "pairs_of_make", None) != pairs:
        make = (type(parent), pairs)
        if make not in _MAKES:
            name = "_".join([type(parent).__name__, *(f"{child}_{kind.__name__}" for child, kind in pairs)])
            _MAKES[make] = type(name, (type(parent),), {"pairs_of_make": pairs})
        parent.__class__ = _MAKES[make]


def separate_projections(model: nn.Module) -> None:
    """Give modules whose projections are fused (Phi-3) or stacked (experts) a layer for each, in place.

    Others stay as they are.

    The model computes what it did. Recipes name these layers, and their weights are stored one by one.
    """
    for module in list(model.modules()):
        own: Any = module
        if isinstance(getattr(module, "qkv_proj", None), nn.Linear):
            heads, kv_heads = own.config.num_attention_heads, own.config.num_key_value_heads
            _separate(own, "qkv_proj", {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads})
            mix_in(own, SeparateProjections)
            own.kept_heads = (heads, kv_heads)
            own.register_buffer("pairs", None)
        if isinstance(getattr(module, "gate_up_proj", None), nn.Linear):
            _separate(own, "gate_up_proj", {"gate_proj": 1, "up_proj": 1})
            mix_in(own, SeparateGate)
        if isinstance(getattr(getattr(module, "experts", None), "gate_up_proj", None), nn.Parameter):
            own.experts = SeparateExperts.of(own.experts)


def _separate(module: nn.Module, name: str, shares: dict[str, int]) -> None:
    """Exchange one layer without bias for several, whose outputs share its own in proportion."""
    fused: Any = getattr(module, name)
    unit = fused.out_features // sum(shares.values())
    parts = fused.weight.detach().split([share * unit for share in shares.values()])
    for child, weight in zip(shares, parts, strict=True):
        rows, columns = weight.shape
        layer = nn.Linear(columns, rows, bias=False, device=weight.device, dtype=weight.dtype)
        layer.weight.data.copy_(weight)
        setattr(module, child, layer.requires_grad_(fused.weight.requires_grad).train(module.training))
    delattr(module, name)


def apply_recipe(model: nn.Module, recipe: dict[str, dict[str, Any]], prefix: str = "") -> None:
    """Change the modules that `recipe` names, in place; their weights are loaded afterwards.

    Raises:
        ValueError: a module that does not exist, or a kind that this file does not know.
    """
    owners_first = sorted(recipe.items(), key=lambda item: item[1]["kind"] == "shared_down")
    for full_name, entry in owners_first:
        name = full_name.removeprefix(prefix)
        parent_name, _, child = name.rpartition(".")
        try:
            parent = model.get_submodule(parent_name)
            module: Any = parent.get_submodule(child)
        except AttributeError as error:
            raise ValueError(f"the recipe names {full_name}, which this model does not have") from error
        options = {key: value for key, value in entry.items() if key != "kind"}
        if entry["kind"] == "low_rank":
            setattr(parent, child, LowRankLinear(**(features_of(module) | options)))
        elif entry["kind"] == "identity_block":
            setattr(parent, child, IdentityBlockLinear(**(features_of(module) | options)))
        elif entry["kind"] == "identity_columns":
            setattr(parent, child, IdentityColumnsLinear(**options))
        elif entry["kind"] == "shared_down":
            owner = model.get_submodule(options["shares"].removeprefix(prefix))
            if not isinstance(owner, LowRankLinear) or isinstance(owner, SharedDownLinear):
                raise ValueError(f"{full_name} shares the factor of {options['shares']}, which has none of its own")
            setattr(parent, child, SharedDownLinear(**options, owner=owner))
        elif entry["kind"] == "linear":
            setattr(parent, child, ResizedLinear(**options))
        elif entry["kind"] == "rms_norm":
            setattr(parent, child, GainFreeRMSNorm(**options))
        elif entry["kind"] == "heads":
            set_heads(module, **options)
        elif entry["kind"] == "narrow_heads":
            set_narrow_heads(module, **options)
        elif entry["kind"] == "shortcuts":
            (entered, between), (_, left) = options["attention"], options["mlp"]
            set_shortcuts(module, nn.Linear(entered, between, bias=False), nn.Linear(between, left, bias=False))
        else:
            raise ValueError(f"{full_name}: unknown kind {entry['kind']!r} in the recipe; use a newer rankwise")
    parents = {full_name.removeprefix(prefix).rpartition(".")[0] for full_name in recipe}
    for name in sorted(parents):
        if not name.rpartition(".")[
            2
        ].isdigit():  # a block: loaders that split a model know it by the name of its class
            name_make(model.get_submodule(name))


def _base_model(base: type, config_class: type) -> Any:
    """The base model (without head) with the recipe applied; its module names lack the head's `model.` prefix."""

    class Model(base):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            separate_projections(self)
            apply_recipe(self, config.recipe or {}, prefix="model.")

    Model.config_class = config_class
    return Model


def _causal_model(base: type, model_class: type, config_class: type) -> Any:
    """The causal language model around a base model with the recipe applied."""

    class Model(base):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = model_class(config)
            self.post_init()

    Model.config_class = config_class
    return Model


class RankwiseLlamaConfig(LlamaConfig):
    """Llama with a recipe."""

    model_type = "rankwise_llama"
    recipe: dict[str, Any] | None = None
    base_model_tp_plan = None


class RankwiseMistralConfig(MistralConfig):
    """Mistral with a recipe."""

    model_type = "rankwise_mistral"
    recipe: dict[str, Any] | None = None
    base_model_tp_plan = None


class RankwiseQwen2Config(Qwen2Config):
    """Qwen2 with a recipe."""

    model_type = "rankwise_qwen2"
    recipe: dict[str, Any] | None = None
    base_model_tp_plan = None


class RankwiseQwen3Config(Qwen3Config):
    """Qwen3 with a recipe."""

    model_type = "rankwise_qwen3"
    recipe: dict[str, Any] | None = None
    base_model_tp_plan = None


class RankwiseOlmo2Config(Olmo2Config):
    """OLMo 2 with a recipe."""

    model_type = "rankwise_olmo2"
    recipe: dict[str, Any] | None = None
    base_model_tp_plan = None


class RankwiseGemma3Config(Gemma3TextConfig):
    """Gemma 3 with a recipe."""

    model_type = "rankwise_gemma3_text"
    recipe: dict[str, Any] | None = None
    base_model_tp_plan = None


class RankwisePhi3Config(Phi3Config):
    """Phi-3 with a recipe."""

    model_type = "rankwise_phi3"
    recipe: dict[str, Any] | None = None
    base_model_tp_plan = None


class RankwiseQwen3MoeConfig(Qwen3MoeConfig):
    """Qwen3-MoE with a recipe."""

    model_type = "rankwise_qwen3_moe"
    recipe: dict[str, Any] | None = None
    base_model_tp_plan = None
    base_model_ep_plan = None


class RankwiseMixtralConfig(MixtralConfig):
    """Mixtral with a recipe."""

    model_type = "rankwise_mixtral"
    recipe: dict[str, Any] | None = None
    base_model_tp_plan = None
    base_model_ep_plan = None


class RankwiseOPTConfig(OPTConfig):
    """OPT with a recipe."""

    model_type = "rankwise_opt"
    recipe: dict[str, Any] | None = None
    base_model_tp_plan = None


class RankwiseLlamaModel(_base_model(LlamaModel, RankwiseLlamaConfig)):  # type: ignore[misc]
    """Llama's decoder with the recipe applied."""


class RankwiseMistralModel(_base_model(MistralModel, RankwiseMistralConfig)):  # type: ignore[misc]
    """Mistral's decoder with the recipe applied."""


class RankwiseQwen2Model(_base_model(Qwen2Model, RankwiseQwen2Config)):  # type: ignore[misc]
    """Qwen2's decoder with the recipe applied."""


class RankwiseQwen3Model(_base_model(Qwen3Model, RankwiseQwen3Config)):  # type: ignore[misc]
    """Qwen3's decoder with the recipe applied."""


class RankwiseOlmo2Model(_base_model(Olmo2Model, RankwiseOlmo2Config)):  # type: ignore[misc]
    """OLMo 2's decoder with the recipe applied."""


class RankwiseGemma3Model(_base_model(Gemma3TextModel, RankwiseGemma3Config)):  # type: ignore[misc]
    """Gemma 3's decoder with the recipe applied."""


class RankwisePhi3Model(_base_model(Phi3Model, RankwisePhi3Config)):  # type: ignore[misc]
    """Phi-3's decoder with a layer for each projection and the recipe applied."""


class RankwiseQwen3MoeModel(_base_model(Qwen3MoeModel, RankwiseQwen3MoeConfig)):  # type: ignore[misc]
    """Qwen3-MoE's decoder with a layer for each matrix of an expert and the recipe applied."""


class RankwiseMixtralModel(_base_model(MixtralModel, RankwiseMixtralConfig)):  # type: ignore[misc]
    """Mixtral's decoder with a layer for each matrix of an expert and the recipe applied."""


class RankwiseOPTModel(_base_model(OPTModel, RankwiseOPTConfig)):  # type: ignore[misc]
    """OPT's decoder with the recipe applied."""


class RankwiseLlamaForCausalLM(_causal_model(LlamaForCausalLM, RankwiseLlamaModel, RankwiseLlamaConfig)):  # type: ignore[misc]
    """Llama with the recipe applied."""


class RankwiseMistralForCausalLM(_causal_model(MistralForCausalLM, RankwiseMistralModel, RankwiseMistralConfig)):  # type: ignore[misc]
    """Mistral with the recipe applied."""


class RankwiseQwen2ForCausalLM(_causal_model(Qwen2ForCausalLM, RankwiseQwen2Model, RankwiseQwen2Config)):  # type: ignore[misc]
    """Qwen2 with the recipe applied."""


class RankwiseQwen3ForCausalLM(_causal_model(Qwen3ForCausalLM, RankwiseQwen3Model, RankwiseQwen3Config)):  # type: ignore[misc]
    """Qwen3 with the recipe applied."""


class RankwiseOlmo2ForCausalLM(_causal_model(Olmo2ForCausalLM, RankwiseOlmo2Model, RankwiseOlmo2Config)):  # type: ignore[misc]
    """OLMo 2 with the recipe applied."""


class RankwiseGemma3ForCausalLM(_causal_model(Gemma3ForCausalLM, RankwiseGemma3Model, RankwiseGemma3Config)):  # type: ignore[misc]
    """Gemma 3 with the recipe applied."""


class RankwisePhi3ForCausalLM(_causal_model(Phi3ForCausalLM, RankwisePhi3Model, RankwisePhi3Config)):  # type: ignore[misc]
    """Phi-3 with the recipe applied."""


class RankwiseQwen3MoeForCausalLM(_causal_model(Qwen3MoeForCausalLM, RankwiseQwen3MoeModel, RankwiseQwen3MoeConfig)):  # type: ignore[misc]
    """Qwen3-MoE with the recipe applied."""


class RankwiseMixtralForCausalLM(_causal_model(MixtralForCausalLM, RankwiseMixtralModel, RankwiseMixtralConfig)):  # type: ignore[misc]
    """Mixtral with the recipe applied."""


class RankwiseOPTForCausalLM(_causal_model(OPTForCausalLM, RankwiseOPTModel, RankwiseOPTConfig)):  # type: ignore[misc]
    """OPT with the recipe applied."""


CONFIGS: dict[str, tuple[Any, Any, Any]] = {
    "llama": (RankwiseLlamaConfig, RankwiseLlamaModel, RankwiseLlamaForCausalLM),
    "mistral": (RankwiseMistralConfig, RankwiseMistralModel, RankwiseMistralForCausalLM),
    "qwen2": (RankwiseQwen2Config, RankwiseQwen2Model, RankwiseQwen2ForCausalLM),
    "qwen3": (RankwiseQwen3Config, RankwiseQwen3Model, RankwiseQwen3ForCausalLM),
    "olmo2": (RankwiseOlmo2Config, RankwiseOlmo2Model, RankwiseOlmo2ForCausalLM),
    "gemma3_text": (RankwiseGemma3Config, RankwiseGemma3Model, RankwiseGemma3ForCausalLM),
    "phi3": (RankwisePhi3Config, RankwisePhi3Model, RankwisePhi3ForCausalLM),
    "qwen3_moe": (RankwiseQwen3MoeConfig, RankwiseQwen3MoeModel, RankwiseQwen3MoeForCausalLM),
    "mixtral": (RankwiseMixtralConfig, RankwiseMixtralModel, RankwiseMixtralForCausalLM),
    "opt": (RankwiseOPTConfig, RankwiseOPTModel, RankwiseOPTForCausalLM),
}
