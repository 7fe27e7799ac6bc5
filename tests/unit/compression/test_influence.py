"""Block influence against cosines of the hidden states that transformers itself returns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from lowrank.compression.influence import block_influence
from lowrank.errors import RankwiseError
from lowrank.model.checkpoint import family_of
from lowrank.model.devices import Devices
from tests import tiny
from tests.unit.model.factor_samples import CPU, TOKENS


@pytest.mark.parametrize("kind", tiny.FEW)
def test_it_is_one_less_the_mean_cosine(kind: str) -> None:
    model = tiny.model(kind)
    last: list[torch.Tensor] = []
    decoder = model.get_submodule(family_of(model).decoder)
    norm = decoder.final_layer_norm if kind == "opt" else decoder.norm  # what it reads, the last block has written
    handle = norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    states = [each.double().numpy() for each in model(TOKENS, output_hidden_states=True).hidden_states[:-1]]
    handle.remove()
    states.append(last[0].double().numpy())
    expected = []
    for x, y in pairwise(states):
        cosines = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
        expected.append(1 - cosines.mean())
    assert len(expected) == tiny.LAYERS
    hooks = [len(module._forward_hooks) for module in model.modules()]
    assert np.allclose(block_influence(model, TOKENS, CPU), expected, atol=1e-6)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks, "its own are gone"


def test_parameters_that_moved_still_take_part_in_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A move to a GPU makes new tensors; the dtype changes here in its place."""
    model = tiny.model("llama")

    @contextmanager
    def moved(given: PreTrainedModel, devices: Devices) -> Iterator[None]:
        given.double()
        yield
        given.float()

    monkeypatch.setattr("lowrank.compression.influence.on_devices", moved)
    block_influence(model, TOKENS, CPU)
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    whole = block_influence(model, TOKENS, CPU)
    monkeypatch.setattr("lowrank.compression.influence.TOKENS_PER_BATCH", 5 * TOKENS.shape[1])
    assert np.allclose(block_influence(model, TOKENS, CPU), whole, atol=1e-7)


def test_states_that_are_no_numbers_name_their_block() -> None:
    model = tiny.model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0] = torch.inf
    with pytest.raises(RankwiseError, match=r"model\.layers\.1: outputs are not finite"):
        block_influence(model, TOKENS, CPU)
