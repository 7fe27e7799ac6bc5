"""Sizes from shapes against the sizes of real things."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel, Qwen3MoeConfig

from lowrank.calibration import statistics as statistics_module
from lowrank.calibration.moments import MomentAccumulator
from lowrank.calibration.output_gradients import collect_output_gradients
from lowrank.cluster.sizes import DOUBLE, HEAD_TOKENS, SINGLE, Sizes
from lowrank.config.sources import ModelShape
from lowrank.evaluation.cost import count_macs
from lowrank.model import losses
from lowrank.model.checkpoint import family_of
from lowrank.ranks.budget import Budget
from lowrank.search.objective import Objective
from lowrank.search.sliced_model import SlicedModel
from tests import tiny
from tests.unit.cluster.published_shapes import LLAMA_7B, LLAMA_13B, LLAMA_70B, MISTRAL_7B, MIXTRAL_8X7B, QWEN3_30B_A3B
from tests.unit.model.factor_samples import TOKENS, bases, shape_of

CPU = torch.device("cpu")
KINDS = list(tiny.SHAPES)


def sizes_of(kind: str) -> Sizes:
    return Sizes(shape_of(kind), "float32")


def nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("kind", tiny.ALL_SHAPES)
def test_weights_of_every_family(kind: str) -> None:
    model = tiny.model(kind)
    positions = sum(p.numel() for name, p in model.named_parameters() if "embed_positions" in name)
    assert sizes_of(kind).parameters == model.num_parameters() - positions
    assert sizes_of(kind).weights == nbytes(model.parameters()) - 4 * positions


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [(LLAMA_7B, 6_738_415_616), (LLAMA_13B, 13_015_864_320), (MISTRAL_7B, 7_241_732_096), (LLAMA_70B, 68_976_648_192)],
)
def test_parameters_that_are_published(shape: dict[str, Any], parameters: int) -> None:
    assert Sizes(ModelShape(**shape), "float16").parameters == parameters


@pytest.mark.parametrize(
    ("shape", "config", "names"),
    [
        (MIXTRAL_8X7B, MixtralConfig, {"intermediate": "intermediate_size", "experts": "num_local_experts"}),
        (QWEN3_30B_A3B, Qwen3MoeConfig, {"intermediate": "moe_intermediate_size", "experts": "num_experts"}),
    ],
)
def test_parameters_with_experts_are_those_that_transformers_counts(
    shape: dict[str, Any], config: Any, names: dict[str, str]
) -> None:
    named = {
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "vocabulary": "vocab_size",
        "tied_embeddings": "tie_word_embeddings",
        "experts_per_token": "num_experts_per_tok",
        **names,
    }
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(**{named[key]: shape[key] for key in named}))
    assert Sizes(ModelShape(**shape), "float16").parameters == model.num_parameters()


def test_what_a_token_passes_of_experts_is_what_their_cards_say() -> None:
    """12.9 billion of Mixtral's parameters, 3.3 of Qwen3's; both count embeddings and head."""
    for shape, billions in ((MIXTRAL_8X7B, 12.9), (QWEN3_30B_A3B, 3.3)):
        sizes = Sizes(ModelShape(**shape), "bfloat16")
        assert (sizes.passed + 2 * sizes.head) / 1e9 == pytest.approx(billions, abs=0.06)


@pytest.mark.parametrize("kind", tiny.ALL_SHAPES)
def test_accumulators_files_and_hidden_states_of_the_statistics(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[MomentAccumulator] = []
    begin = MomentAccumulator.__init__

    def remembered(self: MomentAccumulator, *args: Any) -> None:
        begin(self, *args)
        made.append(self)

    monkeypatch.setattr(MomentAccumulator, "__init__", remembered)
    monkeypatch.setattr(statistics_module.shutil, "rmtree", lambda *_, **__: None)  # hidden states stay
    statistics_module.collect_statistics(tiny.model(kind), TOKENS, 1, tmp_path, CPU, expert_tokens=1)
    sizes, windows = sizes_of(kind), len(TOKENS)
    held = nbytes(t for one in made for t in (one.scatter, *one.window_means)) / tiny.LAYERS
    assert held == sizes.moments(DOUBLE) + DOUBLE * windows * sum(sizes.inputs)
    for file in tmp_path.glob("layer_*.safetensors"):
        assert nbytes(load_file(file).values()) == pytest.approx(sizes.statistics_file(windows), rel=0.005)
    for layer in range(1, tiny.LAYERS):
        states = [load_file(file)["hidden"] for file in tmp_path.glob(f"hidden_{layer:03d}/*.safetensors")]
        assert nbytes(states) == sizes.hidden(TOKENS.numel())
    assert not list(tmp_path.glob(f"hidden_{tiny.LAYERS:03d}/*.safetensors"))  # which nobody would read


@pytest.mark.parametrize("kind", KINDS)
def test_bases_on_disk_and_in_a_sliced_model(kind: str) -> None:
    found, sizes = bases(kind, "naive"), sizes_of(kind)
    for file in found.files:
        assert nbytes(load_file(file).values()) == pytest.approx(sizes.bases_file(), rel=0.01)
    sliced = SlicedModel(tiny.model(kind), Budget.of(shape_of(kind)), found)
    held = nbytes(t for layer in sliced.layers.values() for t in (layer.directions, layer.projection))
    assert held == pytest.approx(sizes.bases(SINGLE) * tiny.LAYERS, rel=0.05)
    objective = Objective(sliced, TOKENS, 1.0, CPU)
    assert nbytes(objective.reference) == sizes.hidden(TOKENS.numel())


@pytest.mark.parametrize("kind", ["llama-gqa", "opt"])
def test_files_of_gradients(kind: str, tmp_path: Path) -> None:
    for file in collect_output_gradients(tiny.model(kind), TOKENS[:2], 2, tmp_path, CPU):
        assert nbytes(load_file(file).values()) == sizes_of(kind).gradients_file


@pytest.mark.parametrize("kind", tiny.ALL_SHAPES)
def test_keys_and_values(kind: str) -> None:
    ids = TOKENS[:3, :7]  # sliding windows of 8 tokens keep no more than these
    cache = tiny.model(kind)(ids, use_cache=True).past_key_values
    held = nbytes(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert held == sizes_of(kind).cache(ids.numel())


@pytest.mark.parametrize("kind", tiny.ALL_SHAPES)
def test_operations_are_twice_the_multiply_accumulates(kind: str) -> None:
    """But for attention, of which the masked half counts there and not here."""
    shape, tokens = shape_of(kind), 24
    macs = count_macs(tiny.model(kind), shape, tokens)
    assert sizes_of(kind).forward(tokens, tokens) == 2 * macs["linears"] + macs["attention"] + 2 * macs["head"]


def saved_for_backward(model: PreTrainedModel, ids: torch.Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters left out, each storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    own |= {buffer.untyped_storage().data_ptr() for buffer in model.buffers()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    decoder = model.get_submodule(family_of(model).decoder)
    embedded = model.get_input_embeddings()(ids).requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = decoder(
            inputs_embeds=embedded, use_cache=False
        ).last_hidden_state  # alive, so that no storage is reused
    assert output.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("kind", tiny.ALL_SHAPES)
def test_activations_that_training_keeps(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but rotations, statistics of norms and attention, and the final norm."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)  # DeepSpeed puts its own there, for good
    ids = TOKENS[:4]
    kept, expected = saved_for_backward(tiny.model(kind), ids), sizes_of(kind).training_activations(ids.numel())
    more = 1.2 if kind in tiny.MORE else 1.1  # masks of sliding windows go with keys and values for each query head
    assert expected < kept < more * expected


def test_constants_are_those_of_the_code() -> None:
    from lowrank.calibration import output_gradients
    from lowrank.cluster import checkpoint_needs, sizes
    from lowrank.evaluation import perplexity
    from lowrank.post_training import distil, loss
    from lowrank.search import objective

    assert statistics_module.TOKENS_PER_BATCH == distil.TOKENS_PER_BATCH == sizes.STATISTICS_TOKENS
    assert output_gradients.TOKENS_PER_BATCH == sizes.GRADIENT_TOKENS
    assert sizes.LOSS_TOKENS == objective.TOKENS_PER_BATCH == perplexity.BATCH_TOKENS
    assert losses.CHUNK_TOKENS == HEAD_TOKENS
    assert loss.CHUNK_TOKENS == checkpoint_needs.TRAINING_HEAD_TOKENS
