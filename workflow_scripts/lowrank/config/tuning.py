"""Sections of presets of post-training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, model_validator

from lowrank.config.base import Distinct, Name, NotNegative, Number, Positive, Section, Text, wrong


class Tuning(Section):
    """Post-training on instructions with DeepSpeed: what every kind has in common."""

    instructions: Name
    learning_rate: Annotated[Number, Field(gt=0)] = 2e-3
    steps: Positive | None = Field(default=None, description="optimiser steps; not with `epochs`")
    epochs: Annotated[Number, Field(gt=0)] | None = Field(
        default=None, description="passes over the instructions; 2 if there are no `steps` either"
    )
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

    @model_validator(mode="before")
    @classmethod
    def _epochs_unless_steps(cls, value: Any) -> Any:
        """Filled in here, so that a preset which is read back from its plain form has one of them too."""
        if not isinstance(value, dict) or value.get("steps") is not None or value.get("epochs") is not None:
            return value
        return {**value, "epochs": 2}

    @classmethod
    def unread(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """Steps or epochs say how long."""
        for one, other in (("steps", "epochs"), ("epochs", "steps")):
            if given.get(one) is not None:
                return {other: f"`{one}: {given[one]}` says how long too; keep one of them"}
        return {}

    @model_validator(mode="after")
    def _batch_divides(self) -> Tuning:
        if self.batch_size % (micro := self.micro_batch_size):
            raise wrong("batch_size", f"{self.batch_size} is no multiple of `micro_batch_size: {micro}`")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise wrong("warmup_steps", f"{self.warmup_steps} leaves nothing of `steps: {self.steps}`")
        return self


class ScaledSubspaceTuning(Tuning):
    """Two diagonal vectors on every low-rank pair (paper, Equation 9)."""

    kind: Literal["scaled-subspace"]
    rank: Positive = Field(default=256, description="r', how many rank dimensions get a trained scale")
    subspace: Literal["random", "top", "bottom"] = "random"

    @property
    def needs_pairs(self) -> bool:
        """Whether it finds nothing to train where a method makes no low-rank pairs."""
        return True


class LoraTuning(Tuning):
    """LoRA on dense layers and on the factors of low-rank pairs, merged afterwards; the paper's baselines have it."""

    kind: Literal["lora"]
    rank: Positive = Field(default=8, description="of the update of one matrix")
    alpha: Annotated[Number, Field(gt=0)] = Field(default=16, description="an update counts alpha / rank times")
    dropout: Annotated[Number, Field(ge=0, lt=1)] = Field(default=0.05, description="of the inputs of the updates")
    learning_rate: Annotated[Number, Field(gt=0)] = 1e-4
    targets: Annotated[Distinct[Text], Field(min_length=1)] | None = Field(
        default=None, description="types of linear layers; null: all of the model's family"
    )
    stages: Distinct[Literal["all", "up", "down"]] = Field(
        default=["all"],
        min_length=1,
        description="what is trained, one after the other, each for all of `steps` or `epochs`: dense layers and both "
        "factors of pairs (all), or one of the factors; SVD-LLM has [up, down]",
    )

    @property
    def needs_pairs(self) -> bool:
        """Whether it finds nothing to train where a method makes no low-rank pairs."""
        return any(stage != "all" for stage in self.stages)


class FeatureDistillation(Section):
    """The factors of low-rank pairs, trained block by block on hidden states of the dense model (Lillama)."""

    kind: Literal["feature-distillation"]
    calibration: Name
    inputs: Distinct[Literal["dense", "compressed"]] = Field(
        default=["dense", "compressed"],
        min_length=1,
        description="what a block reads in training: hidden states of the dense model, those that come through the "
        "compressed blocks before it, or both, whose losses add up",
    )
    learning_rate: Annotated[Number, Field(gt=0)] = 8.6e-5
    weight_decay: Annotated[Number, Field(ge=0)] = 0.01
    epochs: Positive = 1
    batch_size: Positive = Field(default=8, description="windows a step")
    validation_windows: Positive = Field(
        default=8, description="the last ones of the calibration; they choose the step whose factors a block keeps"
    )
    evaluate_every: Positive = Field(default=50, description="steps between two looks at the validation windows")

    @property
    def needs_pairs(self) -> bool:
        """Whether it finds nothing to train where a method makes no low-rank pairs."""
        return True


InstructionTuning = ScaledSubspaceTuning | LoraTuning
AnyTuning = Annotated[InstructionTuning | FeatureDistillation, Field(discriminator="kind")]


def parse_tuning(plain: dict[str, Any]) -> InstructionTuning:
    """The preset of a training on instructions that `plain()` gave to a rule, typed again."""
    adapter: TypeAdapter[InstructionTuning] = TypeAdapter(Annotated[InstructionTuning, Field(discriminator="kind")])
    return adapter.validate_python(plain)
