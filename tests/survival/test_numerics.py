"""Every method on inputs that are constant, too few, of low rank, huge or rounded: good as in float64, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from lowrank.bases.block import bases_of_block
from lowrank.bases.principal import Bases
from lowrank.calibration.output_gradients import OutputGradients, collect_output_gradients, load_output_gradients
from lowrank.calibration.statistics import Statistics, collect_statistics, load_moments
from lowrank.compression.compress import compress_model
from lowrank.config.presets import Covariance
from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.files import save_tensors
from lowrank.methods import method_modules
from lowrank.model.checkpoint import family_of, load_checkpoint, save_checkpoint
from lowrank.model.parameters import count_parameters
from lowrank.ranks.budget import Budget
from lowrank.search.uniform import uniform_layers
from tests import tiny

CPU = torch.device("cpu")
RATIO = 20
LOW_RANK = {"calibration": "c", "covariance": "v"}
NAIVE, FISHER = Covariance(estimator="naive"), Covariance(estimator="naive", gradients="weigh")
METHODS: dict[str, dict[str, Any]] = {
    "aa-svd": {"calibration": "c"},
    "aa-svd with refinement": {"calibration": "c", "refine": 1},
    "afm": LOW_RANK,
    "asvd": {"calibration": "c"},
    "basis-sharing": {"calibration": "c"},
    "bolaco": LOW_RANK | {"validation": "w", "search": "s"},
    "flap": {"calibration": "c"},
    "fwsvd": {"calibration": "c"},
    "llrc": {"calibration": "c", "steps": 100, "learning_rate": 0.3, "growth": 0.3, "settle": 10},
    "llm-pruner": {"calibration": "c", "skip_first": 0, "skip_last": 0},
    "lord": LOW_RANK,
    "modegpt": {"calibration": "c"},
    "obd-llm": {"calibration": "c"},
    "obd-llm by first order": {"calibration": "c", "allocation": "first-order"},
    "rankwise": LOW_RANK,
    "skipcat": {"calibration": "c"},
    "slicegpt": {"calibration": "c"},
    "svd": {},
    "svd-llm": {"calibration": "c"},
    "svd-llm with update": {"calibration": "c", "update": True},
    "zs-svd": {"calibration": "c"},
    "zs-svd with correction": {"calibration": "c", "corrections": 1},
}
Change = Callable[[PreTrainedModel], None]


def usual(model: PreTrainedModel) -> None:
    """A model as it is."""


def of_low_rank(model: PreTrainedModel) -> None:
    """Embeddings in three dimensions of 64: no input of the first block has more."""
    weight = model.get_input_embeddings().weight
    weight.data = (weight[:, :3] @ weight[:3]).contiguous()


def with_dead_layers(model: PreTrainedModel) -> None:
    """Neurons and a head that do nothing, and a matrix of zeros."""
    model.get_submodule("model.layers.0.mlp.up_proj").weight.data[:100] = 0
    model.get_submodule("model.layers.1.self_attn.q_proj").weight.data[:16] = 0
    model.get_submodule("model.layers.1.mlp.gate_proj").weight.data.zero_()


def with_outliers(model: PreTrainedModel) -> None:
    """Features ten thousand times as large as the others in front of all matrices but o; the map is the same."""
    for block in model.model.layers:
        readers = {
            block.input_layernorm: (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj),
            block.post_attention_layernorm: (block.mlp.gate_proj, block.mlp.up_proj),
        }
        for norm, linears in readers.items():
            norm.weight.data[3] *= 1e4
            for linear in linears:
                linear.weight.data[:, 3] /= 1e4
        block.mlp.up_proj.weight.data[5] *= 1e4
        block.mlp.down_proj.weight.data[:, 5] /= 1e4


def random_tokens(windows: int, length: int) -> torch.Tensor:
    return torch.randint(2, 400, (windows, length), generator=torch.Generator().manual_seed(0))


CASES: dict[str, tuple[Change, torch.Tensor]] = {
    "ordinary": (usual, random_tokens(12, 24)),
    "constant features": (usual, torch.full((5, 24), 7)),
    "low rank": (of_low_rank, random_tokens(12, 24)),
    "dead layers": (with_dead_layers, random_tokens(12, 24)),
    "one token": (usual, torch.tensor([[7]])),
    "two tokens": (usual, torch.tensor([[7, 8]])),
    "fewer tokens than dimensions": (usual, random_tokens(1, 10)),
    "windows of two tokens": (usual, random_tokens(40, 2)),
    "outliers": (with_outliers, random_tokens(12, 24)),
}
SVD_LLM = ("svd-llm", "svd-llm with update", "skipcat", "basis-sharing")
"""By one whitening of the inputs."""
OBD_LLM = ("obd-llm", "obd-llm by first order")
ZS_SVD = ("zs-svd", "zs-svd with correction")
SPANNING = ("ordinary", "low rank", "dead layers", "outliers")
"""Cases whose calibration says how other texts are to be treated too; beyond it many choices are equally good."""
FEW = r"1 tokens are too few for a covariance within 1 groups"
NO_LOSS = "two tokens or more"
NO_WEIGHT = r"model\.layers\.[01]\.\S+: no row matters"
NO_GRADIENT = r"model\.layers\.[01], \w+: the loss has no gradient at its output, so nothing says what to keep"
NO_OUTPUT = r"model\.layers\.[01]\.\S+: the loss has no gradient at its output, so nothing says what to keep"
ALIKE = r"model\.layers\.[01]\.\S+: its input channels all fluctuate alike"
ERRORS: dict[tuple[str, str], str] = {
    **{(name, "one token"): rf"model\.layers\.0, attention: {FEW}" for name in ("afm", "bolaco", "lord")},
    **{(name, "one token"): NO_LOSS for name in ("asvd", "fwsvd", "rankwise", *OBD_LLM, *ZS_SVD)},
    ("llm-pruner", "one token"): r"`sequences: 1` of `length: 2` are more than the calibration 'c' has",
    ("flap", "one token"): ALIKE,
    ("flap", "dead layers"): ALIKE,
    # The one token that is predicted attends to nothing but itself, so the loss does not depend on q and k.
    **{("fwsvd", case): NO_WEIGHT for case in ("two tokens", "windows of two tokens", "dead layers")},
    **{(name, case): NO_OUTPUT for name in OBD_LLM for case in ("two tokens", "windows of two tokens", "dead layers")},
    **{("rankwise", case): NO_GRADIENT for case in ("two tokens", "windows of two tokens", "dead layers")},
    **{
        (name, "dead layers"): r"model\.layers\.1\.mlp\.down_proj: all its inputs are zero"
        for name in ("aa-svd", "aa-svd with refinement")
    },
    **{(name, "dead layers"): "block 1, input 'mlp_output': all its inputs are zero" for name in SVD_LLM},
    # Its block is done matrix by matrix: the pair of gate, which is zero, comes before down.
    ("svd-llm with update", "dead layers"): r"model\.layers\.1\.mlp\.gate_proj: all its inputs are zero",
}
# Directions in which there is no input change the loss by rounding errors, in float32. Ranks by the smallest changes
# then leave others out as well.
LOOSE = {("obd-llm by first order", "fewer tokens than dimensions"): 0.2}


def model_of(change: Change, dtype: torch.dtype) -> PreTrainedModel:
    model = tiny.model("llama-gqa")
    with torch.no_grad():
        change(model)
    for parameter in model.parameters():  # the tables of positions stay in float32, as in a model that is opened
        parameter.data = parameter.data.to(dtype)
    return model


def compressed(name: str, change: Change, tokens: torch.Tensor, dtype: torch.dtype, folder: Path) -> PreTrainedModel:
    """A model after all steps that a method needs, each on what the one before has written."""
    kind = name.split()[0]
    model = model_of(change, dtype)
    preset = {"kind": kind, **METHODS[name]}
    if kind == "llm-pruner":
        preset |= {"sequences": min(10, tokens.shape[0]), "length": max(2, min(24, tokens.shape[1]))}
    settings = method_modules()[kind].Settings.model_validate(preset)
    shape = ModelShape.model_validate(tiny.shape("llama-gqa"))
    budget = Budget.of(shape)
    task: dict[str, Any] = {"model": model, "budget": budget, "ratio": RATIO, "seed": 0}
    folder.mkdir()
    if "statistics" in settings.needs or settings.covariance:
        collect_statistics(model, tokens, 1, folder, CPU)
        task["statistics"] = Statistics(folder, shape)
    if settings.covariance:
        write_bases(model, tokens, FISHER if kind == "rankwise" else NAIVE, folder)
        task["bases"] = Bases(folder / "bases", tiny.LAYERS)
    if kind == "bolaco":
        task["allocation"] = {module.name: rank for module, rank in uniform_layers(budget, RATIO, ("v",))}
    if "gradients" in settings.needs:
        (folder / "gradients").mkdir()
        collect_output_gradients(model, tokens, 1, folder / "gradients", CPU)
        task["gradients"] = OutputGradients(folder / "gradients", shape)
    if "tokens" in settings.needs:
        task["tokens"] = tokens
    compress_model(kind, settings.plain(), task)
    count = count_parameters(model, shape)
    assert count["decoder_linears"] <= 0.8 * count["decoder_linears_dense"]
    return model


def write_bases(model: PreTrainedModel, tokens: torch.Tensor, covariance: Covariance, folder: Path) -> None:
    family = family_of(model)
    gradients = folder / "gradients"
    if covariance.gradients != "none":
        gradients.mkdir()
        collect_output_gradients(model, tokens, 1, gradients, CPU)
    for layer in range(tiny.LAYERS):
        where = f"{family.blocks}.{layer}"
        modules = {t.name: (t.site, model.get_submodule(f"{where}.{t.path}")) for t in family.types}
        linears = {name: (site, module.weight, module.bias) for name, (site, module) in modules.items()}
        file = f"layer_{layer:03d}.safetensors"
        loaded = load_output_gradients(gradients / file, linears) if gradients.is_dir() else None
        moments = load_moments(folder / file, family.sites)
        save_tensors(folder / "bases" / file, bases_of_block(linears, moments, covariance, CPU, where, loaded))


def error_of(model: nn.Module, dense: nn.Module, tokens: torch.Tensor) -> float:
    """Relative error of the logits."""
    with torch.no_grad():
        found, expected = model(tokens).logits.double(), dense(tokens).logits.double()
    assert bool(found.isfinite().all())
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_as_good_as_in_float64_or_says_why_not(name: str, case: str, tmp_path: Path) -> None:
    change, tokens = CASES[case]
    if (name, case) in ERRORS:
        with pytest.raises(RankwiseError, match=ERRORS[name, case]):
            compressed(name, change, tokens, torch.float32, tmp_path / "single")
        return
    single = compressed(name, change, tokens, torch.float32, tmp_path / "single")
    double = compressed(name, change, tokens, torch.float64, tmp_path / "double")
    dense, loose = model_of(change, torch.float64), LOOSE.get((name, case), 0.0)
    for probe in (tokens, random_tokens(4, 16)) if case in SPANNING else (tokens,):
        assert error_of(single, dense, probe) < max(1.02 * error_of(double, dense, probe) + 1e-4, loose)


def test_all_methods_are_here() -> None:
    assert {name.split()[0] for name in METHODS} | {"dense"} == set(method_modules())


@pytest.mark.parametrize("name", METHODS)
def test_a_bfloat16_model(name: str, tmp_path: Path) -> None:
    """It is compressed as its float32 twin, up to rounding, and so it is after a way through a file."""
    tokens = random_tokens(12, 24)
    rounded = compressed(name, lambda model: None, tokens, torch.bfloat16, tmp_path / "bfloat16")
    twin = compressed(name, lambda model: model.bfloat16().float(), tokens, torch.float32, tmp_path / "float32")
    dense = model_of(usual, torch.float32)
    found, expected = (error_of(model, dense, random_tokens(4, 16)) for model in (rounded, twin))
    assert found < 1.05 * expected + 0.05
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.bfloat16}
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    save_checkpoint(rounded, tmp_path / "tokenizer", tmp_path / "checkpoint")
    again = load_checkpoint(tmp_path / "checkpoint", torch.bfloat16)
    assert torch.equal(again(tokens).logits, rounded(tokens).logits)


@pytest.mark.parametrize("name", METHODS)
def test_weights_that_are_not_finite_name_the_layer(name: str, tmp_path: Path) -> None:
    def spoil(model: PreTrainedModel) -> None:
        model.get_submodule("model.layers.1.mlp.down_proj").weight.data[3, 4] = float("nan")

    with pytest.raises(RankwiseError, match=r"model\.layers\.\d"):
        compressed(name, spoil, random_tokens(6, 24), torch.float32, tmp_path / "x")
