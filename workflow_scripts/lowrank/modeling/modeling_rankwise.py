"""Models whose linear layers may be low-rank pairs, as their recipe says.

This file is copied into every compressed checkpoint, so it needs nothing but torch and transformers:
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` opens the checkpoint anywhere.

The recipe in `config.json` maps module names to what each became:

    {"model.layers.0.mlp.up_proj": {"kind": "low_rank", "rank": 312, "bias": true}, ...}

Modules that it does not name are those of the base architecture.
"""

from typing import Any

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    OPTConfig,
    OPTForCausalLM,
    OPTModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)


class LowRankLinear(nn.Module):
    """A linear layer of rank r: `y = up(down(x)) + bias`, with `down` (r x n) applied first and `up` (m x r)."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        y: torch.Tensor = self.up(self.down(x))
        return y


def apply_recipe(model: nn.Module, recipe: dict[str, dict[str, Any]], prefix: str = "") -> None:
    """Replace the modules that `recipe` names, in place; their weights are loaded afterwards.

    Raises:
        ValueError: a module that does not exist, or a kind that this file does not know.
    """
    for full_name, entry in recipe.items():
        name = full_name.removeprefix(prefix)
        parent_name, _, child = name.rpartition(".")
        try:
            parent = model.get_submodule(parent_name)
            linear: Any = parent.get_submodule(child)
        except AttributeError as error:
            raise ValueError(f"the recipe names {full_name}, which this model does not have") from error
        if entry["kind"] != "low_rank":
            raise ValueError(f"{full_name}: unknown kind {entry['kind']!r} in the recipe; use a newer rankwise")
        setattr(parent, child, LowRankLinear(linear.in_features, linear.out_features, entry["rank"], entry["bias"]))


def _base_model(base: type, config_class: type) -> Any:
    """The base model (without head) with the recipe applied; its module names lack the head's `model.` prefix."""

    class Model(base):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
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


class RankwiseOPTForCausalLM(_causal_model(OPTForCausalLM, RankwiseOPTModel, RankwiseOPTConfig)):  # type: ignore[misc]
    """OPT with the recipe applied."""


CONFIGS: dict[str, tuple[Any, Any, Any]] = {
    "llama": (RankwiseLlamaConfig, RankwiseLlamaModel, RankwiseLlamaForCausalLM),
    "mistral": (RankwiseMistralConfig, RankwiseMistralModel, RankwiseMistralForCausalLM),
    "qwen2": (RankwiseQwen2Config, RankwiseQwen2Model, RankwiseQwen2ForCausalLM),
    "qwen3": (RankwiseQwen3Config, RankwiseQwen3Model, RankwiseQwen3ForCausalLM),
    "opt": (RankwiseOPTConfig, RankwiseOPTModel, RankwiseOPTForCausalLM),
}
