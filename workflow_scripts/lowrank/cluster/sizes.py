"""How large things are, from a model's shape alone: weights, statistics, bases, activations, arithmetic.

Bytes, unless a name says otherwise; T tokens, windows of l tokens, a linear layer of m x n weights, b bytes a number of
the model's dtype. Nothing here is a limit of the code: these are the sizes that `resources` adds up to estimates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from lowrank.cluster.needs import Work
from lowrank.config.sources import ModelShape
from lowrank.model.families import (
    FAMILIES,
    LinearModule,
    bias_parameters,
    family_for,
    norm_parameters,
    router_parameters,
)
from lowrank.ranks.budget import Budget, largest_rank

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
SINGLE, DOUBLE = 4, 8
HEAD_TOKENS = 256
"""Tokens whose logits exist at once where the losses of a model are taken (`losses.CHUNK_TOKENS`)."""

LOSS_TOKENS = 2048
"""Tokens of a forward pass where losses are taken."""

STATISTICS_TOKENS, GRADIENT_TOKENS = 4096, 512
"""Tokens of a pass in the statistics, and of a backward pass for gradients."""


def batch_tokens(length: int, tokens: int) -> int:
    """Tokens of one forward pass of windows that are put together up to `tokens`: at least one window."""
    return max(1, tokens // length) * length


@dataclass(frozen=True)
class Sizes:
    """The sizes of one model.

    Attributes:
        shape: of the model.
        dtype: that it is opened in.
        kept: share of the decoder's linear weights that compression left.
    """

    shape: ModelShape
    dtype: str
    kept: float = 1.0

    @property
    def number(self) -> int:
        """b."""
        return BYTES[self.dtype]

    @cached_property
    def block(self) -> list[LinearModule]:
        """The linear layers of one block; all blocks have the same."""
        return list(Budget.of(self.shape.model_copy(update={"layers": 1})).modules)

    @cached_property
    def inputs(self) -> list[int]:
        """n of each distinct input of a block's linear layers."""
        sites = family_for(self.shape).sites
        return [module.in_features for module in self.block if sites[module.type.site] is module.type]

    # --- numbers of parameters ---

    @property
    def linears(self) -> float:
        """Weights of the decoder's linear layers that are left."""
        return self.kept * self.shape.layers * sum(module.parameters for module in self.block)

    def share_of(self, module: LinearModule) -> float:
        """Share of the tokens that pass a layer: of all experts of a block the same, as if routers were balanced."""
        return 1.0 if module.type.expert is None else self.shape.experts_per_token / self.shape.experts

    @property
    def passed(self) -> float:
        """Those of `linears` that a token passes, and the routers."""
        block = sum(self.share_of(module) * module.parameters for module in self.block)
        return self.kept * self.shape.layers * block + router_parameters(self.shape)

    @property
    def head(self) -> int:
        """Weights of the head, V d."""
        return self.shape.vocabulary * self.shape.hidden

    @property
    def rest(self) -> int:
        """Biases, norms and routers."""
        return bias_parameters(self.shape) + norm_parameters(self.shape) + router_parameters(self.shape)

    @property
    def parameters(self) -> float:
        """All of them, tied ones once; without the positions that OPT learns, which the shape does not tell."""
        return self.linears + self.head * (1 if self.shape.tied_embeddings else 2) + self.rest

    # --- bytes ---

    @property
    def weights(self) -> float:
        """The model as it is opened."""
        return self.parameters * self.number

    @property
    def block_weights(self) -> float:
        """The linear layers of all blocks: what is divided where they lie on several GPUs."""
        return self.linears * self.number

    def moments(self, width: int) -> int:
        """The covariances of a block's inputs, sum n^2, at `width` bytes a number."""
        return width * sum(n * n for n in self.inputs)

    def statistics(self, windows: int) -> int:
        """A block's statistics: covariances in float32, a mean for each window in float64."""
        return self.moments(SINGLE) + DOUBLE * (windows + 1) * sum(self.inputs)

    def output_moments(self, width: int) -> int:
        """The second moments of the gradients at a block's outputs, sum m^2, at `width` bytes a number."""
        return width * sum(module.out_features**2 for module in self.block)

    def statistics_file(self, windows: int) -> int:
        """`statistics` on disk, where half of a covariance is enough."""
        return self.statistics(windows) - SINGLE * sum(n * n - _packed(n) for n in self.inputs)

    @property
    def gradients_file(self) -> int:
        """`output_moments` on disk, likewise, in float32."""
        return SINGLE * sum(_packed(module.out_features) for module in self.block)

    def bases(self, width: int, full: bool = False) -> int:
        """A block's bases: directions m x k, projections k x n and the small vectors, at `width` bytes a number.

        k is the largest rank that saves parameters, or min(m, n) in `full` bases.
        """
        return width * sum(_basis_numbers(module.out_features, module.in_features, full) for module in self.block)

    def bases_file(self, full: bool = False, projections: bool = False) -> int:
        """`bases` on disk, in float32: projections only where weights and directions do not tell them."""
        multiplied = sum(_directions(m.out_features, m.in_features, full) * m.in_features for m in self.block)
        return self.bases(SINGLE, full) - (0 if projections else SINGLE * multiplied)

    def projecting(self, full: bool = False) -> int:
        """What lives at once while a projection is computed: weights and both factors, in float32."""
        sizes = [(m.out_features, m.in_features, _directions(m.out_features, m.in_features, full)) for m in self.block]
        return SINGLE * max(m * n * self.widened + k * (m + n) for m, n, k in sizes)

    def hidden(self, tokens: float) -> float:
        """Hidden states of T tokens, T d b."""
        return tokens * self.shape.hidden * self.number

    @property
    def query(self) -> int:
        """Width of the queries, and of what attention puts out."""
        return self.shape.heads * self.shape.head_dim

    @property
    def key_value(self) -> int:
        """Width of the keys, and of the values."""
        return self.shape.kv_heads * self.shape.head_dim

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies two projections."""
        return any(module.type.name == "gate" for module in self.block)

    def activations(self, tokens: float) -> float:
        """Of one block in inference: what lives at once in its MLP or its attention, whichever is more, and a norm."""
        shape = self.shape
        mlp = 2 * shape.hidden + (3 if self.gated else 2) * shape.intermediate
        if shape.experts:  # one at a time, which may get all tokens: what it reads, and its weighted outputs
            mlp += 3 * shape.hidden
        attention = 2 * shape.hidden + 3 * self.query + 4 * self.key_value
        return tokens * (max(mlp, attention) * self.number + shape.hidden * SINGLE)

    def training_activations(self, tokens: float) -> float:
        """What all blocks keep for a backward pass through frozen layers: queries, keys, values, what attention puts
        out, the gate, its activation and the other projection; and what norms read, in float32."""
        family = FAMILIES[self.shape.family]
        mlp = (3 if self.gated else 1) * self.shape.intermediate
        if self.shape.experts:  # and the outputs that the router's weights multiply
            mlp = self.shape.experts_per_token * (mlp + self.shape.hidden)
        kept = 2 * self.query + 2 * self.key_value + mlp
        normed = family.norms * self.shape.hidden + (0 if family.normed == "nothing" else self.query + self.key_value)
        return tokens * self.shape.layers * (kept * self.number + normed * SINGLE)

    @property
    def widened(self) -> int:
        """How many copies it takes to have something in float32: none if it is."""
        return int(self.number != SINGLE)

    def logits(self, tokens: float, copies: int) -> float:
        """Logits of T tokens in the model's dtype and in float32, and `copies` more: log-probabilities, gradients."""
        return tokens * self.shape.vocabulary * (self.number + (copies + self.widened) * SINGLE)

    def cache(self, tokens: float) -> float:
        """Keys and values of T tokens in all blocks; sliding windows keep fewer, and are not told by the shape."""
        return tokens * 2 * self.shape.layers * self.key_value * self.number

    # --- arithmetic, in floating point operations ---

    def forward(self, tokens: float, length: int, head: bool = True) -> float:
        """One pass over T tokens in windows of l: 2 a weight, and 2 l a number of the queries and of the outputs."""
        attention = 2 * length * self.query * self.shape.layers  # half of it is masked
        return tokens * (2 * self.passed + attention + (2 * self.head if head else 0))

    def input_products(self, tokens: float) -> float:
        """The sums x x' of the inputs of all blocks, of which little more than half is formed."""
        sites = family_for(self.shape).sites
        read = [module for module in self.block if sites[module.type.site] is module.type]
        return 2 * tokens * self.shape.layers * sum(self.share_of(m) * _packed(m.in_features) for m in read)

    def output_products(self, tokens: float) -> float:
        """The sums g g' of the gradients at the outputs of all blocks' layers, likewise."""
        return 2 * tokens * self.shape.layers * sum(self.share_of(m) * _packed(m.out_features) for m in self.block)

    def decompositions(self) -> float:
        """The bases of all linear layers: 9 n^3 an eigendecomposition, and the products around it."""
        return self.shape.layers * sum(_basis_work(module.out_features, module.in_features) for module in self.block)

    def projections(self, full: bool = False) -> float:
        """The projections of all linear layers, 2 k m n each."""
        block = sum(2 * _directions(m.out_features, m.in_features, full) * m.parameters for m in self.block)
        return float(self.shape.layers * block)

    def narrow_decompositions(self, neurons: int) -> float:
        """The same for the MLPs alone, with so many neurons a block."""
        work = 0.0
        for module in self.block:
            if module.type.output == "intermediate":
                work += _basis_work(neurons, module.in_features)
            elif module.type.input == "intermediate":
                work += _basis_work(module.out_features, neurons)
        return self.shape.layers * work


def _packed(n: int) -> int:
    """Numbers of a symmetric matrix as files hold it (`gram.packed`): panels of 256 rows, from the diagonal on."""
    return sum(min(256, n - start) * (n - start) for start in range(0, n, 256))


def either(**parts: float) -> dict[str, float]:
    """Of things that are not there at the same time, the largest."""
    name = max(parts, key=lambda part: parts[part])
    return {name: parts[name]}


def in_dtype(sizes: Sizes, operations: float, **other: float) -> Work:
    """Operations in a model's own precision, and other work; a model in 32 bits has nothing made of parts."""
    if sizes.number == SINGLE:
        return Work(single=operations + other.pop("single", 0) + other.pop("parts", 0), **other)
    return Work(half=operations, **other)


def decomposition(modules: Iterable[LinearModule]) -> int:
    """Bytes of the largest decomposition among some layers, in float64.

    Narrow layers (m <= n) decompose the m x m covariance of their outputs, wide ones the n x n one of their inputs and
    a Gram matrix of that size; eigenvectors and the solver's work are five more matrices of the same size.
    """
    return max(DOUBLE * _matrices(module.out_features, module.in_features) for module in modules)


def _matrices(m: int, n: int) -> int:
    """Numbers that live at once in one decomposition."""
    return 2 * m * n + n * n + 6 * m * m if m <= n else 4 * m * n + 6 * n * n


def _basis_numbers(m: int, n: int, full: bool) -> int:
    k = _directions(m, n, full)
    return k * (m + n) + m + k + min(m, n)


def _directions(m: int, n: int, full: bool) -> int:
    """k."""
    return min(m, n) if full else largest_rank(m, n)


def _basis_work(m: int, n: int) -> float:
    k = largest_rank(m, n)
    if m <= n:
        return 2 * m * n * n + 2 * m * m * n + 9 * m**3 + 2 * k * m * n
    return 2 * m * n * n * 2 + 2 * 9 * n**3 + 4 * m * n * n + 2 * k * m * n
