"""Sections of evaluation suites: what a checkpoint is judged by."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lowrank.config.base import AtLeastTwo, Distinct, Name, Positive, Section, Seed, Text, wrong


class PerplexitySuite(Section):
    """Token perplexity on held-out corpora: non-overlapping windows, or a stride with overlapping context."""

    kind: Literal["perplexity"]
    corpora: Distinct[Name] = Field(min_length=1)
    length: AtLeastTwo
    stride: Positive | None = Field(default=None, description="tokens scored per window after the first; null: length")
    windows: Positive | None = Field(default=None, description="the first so many windows; null: all")
    add_bos: bool = Field(
        default=True,
        description="the BOS token once, at the start of a corpus (for Gemma 3 of each window), if the tokenizer "
        "adds it by default",
    )

    @model_validator(mode="after")
    def _stride_within_window(self) -> PerplexitySuite:
        if self.stride is not None and self.stride > self.length:
            raise wrong("stride", f"{self.stride} is longer than `length: {self.length}`")
        return self


METRICS = {
    "boolq": ("acc",),
    "piqa": ("acc", "acc_norm"),
    "hellaswag": ("acc", "acc_norm"),
    "winogrande": ("acc",),
    "arc_easy": ("acc", "acc_norm"),
    "arc_challenge": ("acc", "acc_norm"),
    "openbookqa": ("acc", "acc_norm"),
}
"""Task whose scored rows are known here -> what the harness computes of it."""


class ZeroShotSuite(Section):
    """Zero-shot accuracy by the Language Model Evaluation Harness."""

    kind: Literal["zero-shot"]
    tasks: dict[Name, Literal["acc", "acc_norm"]] = Field(min_length=1, description="task -> metric of the average")
    limit: AtLeastTwo | None = Field(default=None, description="documents a task; only in a config with `smoke: true`")
    batch_tokens: Positive = Field(
        default=4096,
        description="tokens of a forward pass, padding included; fewer if a GPU's memory does not hold them",
    )
    add_bos: bool = True
    max_length: AtLeastTwo = 2048
    seed: Seed = 0


class CostSuite(Section):
    """Parameters, multiply-accumulates, bytes, memory, and measured throughput."""

    kind: Literal["cost"]
    mac_tokens: Positive = Field(default=64, description="tokens of the forward pass whose MACs are counted")
    prompt_tokens: Positive = 128
    new_tokens: Positive = 32
    batch_size: Positive = 1
    repeats: Positive = 3


class GenerationSuite(Section):
    """Greedy continuations of prompts (paper, Table 9)."""

    kind: Literal["generation"]
    prompts: Distinct[Text] = Field(min_length=1)
    new_tokens: Positive = 64


Suite = Annotated[PerplexitySuite | ZeroShotSuite | CostSuite | GenerationSuite, Field(discriminator="kind")]
