"""SliceGPT against a slow float64 computation that never rotates: it projects the stream of the dense model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lowrank.compression.compress import compress_model
from lowrank.compression.slicing import reference_total, sliced_parameters, sliced_size, widths_of_slice, widths_within
from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.model.checkpoint import family_of, load_checkpoint, save_checkpoint
from lowrank.model.modeling_rankwise import GainFreeRMSNorm, Shortcuts
from lowrank.model.parameters import count_parameters, shortcut_parameters
from lowrank.ranks.budget import ALIGNMENT, Budget
from tests import tiny
from tests.unit.ranks.test_budget import LLAMA_7B, OTHER_7B

KINDS = tiny.ROTATED
NORMS = (LlamaRMSNorm, MistralRMSNorm, Phi3RMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)
EPS = 1e-6


def some_tokens(windows: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(2, 400, (windows, length), generator=torch.Generator().manual_seed(seed))


TOKENS, OTHERS = some_tokens(12, 16, seed=1), some_tokens(2, 11, seed=2)


def a_model(kind: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A tiny model whose norms have gains, so that leaving one out would be seen."""
    made = tiny.model(kind)
    rotary = copy.deepcopy(made.model.rotary_emb)
    model = made.to(dtype)
    model.model.rotary_emb = rotary  # a model that is loaded in a dtype keeps its frequencies in float32
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, NORMS):
            module.weight.data = 1 + 0.5 * torch.rand(module.weight.shape, generator=generator).to(dtype)
    return model


def sliced(model: PreTrainedModel, kind: str, ratio: int = 30, **changes: Any) -> PreTrainedModel:
    """Compress a model in place."""
    task = {"model": model, "budget": Budget.of(ModelShape(**tiny.shape(kind))), "ratio": ratio, "seed": 0}
    compress_model("slicegpt", {"kind": "slicegpt", "calibration": "c", **changes}, task | {"tokens": TOKENS})
    return model


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms in float64: those of transformers, and ours, round to float32 inside, whatever the model's dtype."""

    def dense(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def without_gain(self: GainFreeRMSNorm, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / self.divisor + self.eps)

    for norm in NORMS:
        monkeypatch.setattr(norm, "forward", dense)
    monkeypatch.setattr(GainFreeRMSNorm, "forward", without_gain)


class Reference:
    """The dense model in numpy, one token and one head at a time, with a hook on the stream behind each branch."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
        positions = torch.arange(TOKENS.shape[1])[None]
        cos, sin = model.model.rotary_emb(torch.zeros(1, dtype=torch.float64), positions)
        self.cos, self.sin = cos[0].numpy(), sin[0].numpy()

    def logits(self, ids: torch.Tensor, change: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
        """Logits of windows; `change(place, states)` replaces the stream, windows x length x d."""
        states = self.weights["model.embed_tokens.weight"][ids.numpy()]
        for layer in range(tiny.LAYERS):
            states = change(2 * layer + 1, states + np.stack([self.attention(layer, window) for window in states]))
            states = change(2 * layer + 2, states + np.stack([self.mlp(layer, window) for window in states]))
        normed = np.stack([[self.norm("model.norm", x) for x in window] for window in states])
        return normed @ self.weights["lm_head.weight"].T

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        return self.weights[f"{name}.weight"] * x / np.sqrt((x * x).mean() + EPS)

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return self.weights[f"{name}.weight"] @ x + self.weights.get(f"{name}.bias", 0.0)

    def mlp(self, layer: int, window: np.ndarray) -> np.ndarray:
        block = f"model.layers.{layer}"
        rows = []
        for state in window:
            x = self.norm(f"{block}.post_attention_layernorm", state)
            gate = self.linear(f"{block}.mlp.gate_proj", x)
            fed = gate / (1 + np.exp(-gate)) * self.linear(f"{block}.mlp.up_proj", x)
            rows.append(self.linear(f"{block}.mlp.down_proj", fed))
        return np.stack(rows)

    def attention(self, layer: int, window: np.ndarray) -> np.ndarray:
        block, config = f"model.layers.{layer}", self.model.config
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, tiny.HEAD_DIM
        normed = [self.norm(f"{block}.input_layernorm", state) for state in window]
        q, k, v = (
            [self.linear(f"{block}.self_attn.{name}_proj", x).reshape(-1, size) for x in normed] for name in "qkv"
        )
        q, k = ([[self.turned(f"{block}.self_attn.{n}_norm", h, t) for h in r] for t, r in enumerate(x)]
                for n, x in (("q", q), ("k", k)))  # fmt: skip
        rows = []
        for token in range(len(window)):
            mixed = []
            for head in range(heads):
                shared = head // (heads // kv_heads)
                seen = range(max(0, token + 1 - (getattr(config, "sliding_window", None) or token + 1)), token + 1)
                scores = np.array([q[token][head] @ k[past][shared] for past in seen]) / np.sqrt(size)
                share = np.exp(scores - scores.max())
                mixed.append(sum(w * v[past][shared] for past, w in zip(seen, share / share.sum(), strict=True)))
            rows.append(self.linear(f"{block}.self_attn.o_proj", np.concatenate(mixed)))
        return np.stack(rows)

    def turned(self, norm: str, head: np.ndarray, position: int) -> np.ndarray:
        """A query or key after its norm, if it has one, and its rotation by position."""
        x = self.norm(norm, head) if f"{norm}.weight" in self.weights else head
        x, others = np.split(x, [self.cos.shape[-1]])  # some models rotate the first dimensions alone
        first, second = np.split(x, 2)
        turned = x * self.cos[position] + np.concatenate([-second, first]) * self.sin[position]
        return np.concatenate([turned, others])


def projectors(reference: Reference, widths: tuple[int, ...], sequential: bool = True) -> dict[int, np.ndarray]:
    """Of each place: the projection onto the leading right singular vectors of all calibration states there."""
    found: dict[int, np.ndarray] = {}

    def project(place: int, states: np.ndarray) -> np.ndarray:
        _, _, vectors = np.linalg.svd(states.reshape(-1, states.shape[-1]), full_matrices=False)
        leading = vectors[: widths[place]]
        found[place] = leading.T @ leading if place + 1 < len(widths) else np.eye(states.shape[-1])
        return states @ found[place] if sequential else states

    reference.logits(TOKENS, project)
    return found


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("kind", KINDS)
def test_the_sliced_model_is_the_dense_one_with_its_stream_projected(kind: str) -> None:
    reference = Reference(a_model(kind))
    widths = widths_of_slice(tiny.HIDDEN, tiny.LAYERS, 0.4)
    found = projectors(reference, widths)
    expected = reference.logits(OTHERS, lambda place, states: states @ found[place])
    logits = sliced(a_model(kind), kind, slice=0.4)(OTHERS).logits
    np.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=1e-8)

    dense = reference.logits(OTHERS, lambda _, states: states)
    assert np.abs(expected - dense).max() > 0.1
    at_once = projectors(reference, widths, sequential=False)
    otherwise = reference.logits(OTHERS, lambda place, states: states @ at_once[place])
    assert np.abs(expected - otherwise).max() > 1e-3  # bases of the stream that is not yet cut are others


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_of_zero_leaves_the_logits_in_float64(kind: str) -> None:
    model = sliced(a_model(kind), kind, slice=0.0)
    assert all(isinstance(block, Shortcuts) for block in model.model.layers)
    expected = a_model(kind)(OTHERS).logits
    torch.testing.assert_close(model(OTHERS).logits, expected, rtol=0, atol=1e-8)


@pytest.mark.usefixtures("exact_norms")
def test_biases_of_layers_that_write_to_the_stream_are_rotated_too() -> None:
    def biased() -> PreTrainedModel:
        model = a_model("llama")
        for name, layer in model.named_modules():
            if name.endswith(("o_proj", "down_proj")):
                layer.bias = torch.nn.Parameter(torch.linspace(-1, 1, tiny.HIDDEN).double(), requires_grad=False)
        return model

    reference = Reference(biased())
    found = projectors(reference, widths_of_slice(tiny.HIDDEN, tiny.LAYERS, 0.25))
    expected = reference.logits(OTHERS, lambda place, states: states @ found[place])
    logits = sliced(biased(), "llama", slice=0.25)(OTHERS).logits
    np.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_of_zero_leaves_the_logits_in_float32(kind: str) -> None:
    model = sliced(a_model(kind, torch.float32), kind, slice=0.0)
    expected = a_model(kind, torch.float32)(OTHERS).logits
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(model(OTHERS).logits, expected, rtol=0, atol=1e-4)
    counts = count_parameters(model, ModelShape(**tiny.shape(kind)))
    assert counts["decoder_linears"] == counts["decoder_linears_dense"] + 2 * tiny.LAYERS * tiny.HIDDEN**2


@pytest.mark.usefixtures("exact_norms")
def test_a_rotated_model_is_sliced_to_the_same_function() -> None:
    """With gains of one, a rotation of the whole stream changes nothing of a dense model, nor of what becomes of it."""
    first, second = (tiny.model("llama").double() for _ in range(2))  # its gains are one, its head is not tied
    rotation = torch.linalg.qr(torch.randn(tiny.HIDDEN, tiny.HIDDEN, dtype=torch.float64)).Q
    for name, weight in second.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data = rotation.T @ weight.data
        elif weight.dim() == 2:
            weight.data = weight.data @ rotation
    dense = first(OTHERS).logits
    torch.testing.assert_close(second(OTHERS).logits, dense, rtol=0, atol=1e-9)
    one, other = (sliced(model, "llama", ratio=40)(OTHERS).logits for model in (first, second))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-8)
    assert (one - dense).abs().max() > 0.1


@pytest.mark.parametrize("ratio", [10, 25, 50])
@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_is_met_as_compression_counts_it(kind: str, ratio: int) -> None:
    shape = ModelShape(**tiny.shape(kind))
    budget = Budget.of(shape)
    widths = widths_within(budget, ratio)
    model = sliced(a_model(kind, torch.float32), kind, ratio)
    counts = count_parameters(model, shape)
    assert counts["decoder_linears"] == sliced_parameters(budget, widths) <= budget.allowed(ratio)
    assert counts["total"] == model.num_parameters()
    assert shortcut_parameters(model) == sum(a * b for a, b in pairwise(widths))
    block = model.model.layers[1]
    assert block.self_attn.q_proj.in_features == widths[2]
    assert block.mlp.up_proj.in_features == block.self_attn.o_proj.out_features == widths[3]
    assert block.mlp.down_proj.out_features == widths[4] == tiny.HIDDEN


@settings(max_examples=150, deadline=None)
@given(
    ratio=st.integers(1, 60), layers=st.integers(1, 24), hidden=st.integers(16, 300), wide=st.integers(1, 5),
    kv_heads=st.sampled_from([1, 2, 4]), head_dim=st.sampled_from([16, 64, 128]),
)  # fmt: skip
def test_no_budget_is_exceeded_or_missed_by_eight_channels(
    ratio: int, layers: int, hidden: int, wide: int, kv_heads: int, head_dim: int
) -> None:
    shape = ModelShape(
        family="llama", layers=layers, hidden=hidden, intermediate=wide * hidden, heads=4, kv_heads=kv_heads,
        head_dim=head_dim, vocabulary=100, tied_embeddings=False,
    )  # fmt: skip
    budget = Budget.of(shape)
    narrowest = (hidden, *[ALIGNMENT] * (2 * layers - 1), hidden)
    if sliced_parameters(budget, narrowest) > budget.allowed(ratio):
        with pytest.raises(RankwiseError, match=f"SliceGPT cannot remove {ratio} %"):
            widths_within(budget, ratio)
        return
    widths = widths_within(budget, ratio)
    inner = widths[1:-1]
    assert widths[0] == widths[-1] == hidden
    assert all(width % ALIGNMENT == 0 or width == hidden for width in inner)
    assert inner == tuple(sorted(inner))
    assert inner[-1] - inner[0] in range(ALIGNMENT + 1)
    assert sliced_parameters(budget, widths) <= budget.allowed(ratio)
    place = max(place for place in range(2 * layers - 1) if inner[place] == inner[0])  # the next to be widened
    wider = list(widths)
    wider[place + 1] = min(hidden, inner[place] + ALIGNMENT)
    assert sliced_parameters(budget, tuple(wider)) > budget.allowed(ratio)


def test_a_model_of_seven_billion_parameters_is_within_a_hundredth_of_a_point() -> None:
    budget = Budget.of(LLAMA_7B)
    for ratio in (10, 20, 30, 50):
        kept = sliced_parameters(budget, widths_within(budget, ratio)) / budget.dense_parameters
        assert 0.9999 - ratio / 100 < kept <= 1 - ratio / 100


@pytest.mark.parametrize(
    ("share", "width", "linears", "total", "of_dense"),
    [
        (0.10, 3680, 89.9, 6.94e9, 103.0),
        (0.20, 3272, 80.0, 6.11e9, 90.6),
        (0.25, 3072, 75.2, 5.70e9, 84.7),
        (0.30, 2864, 70.1, 5.29e9, 78.5),
        (0.35, 2656, 65.1, 4.89e9, 72.5),
        (0.40, 2456, 60.2, 4.50e9, 66.8),
    ],
)
def test_sizes_that_its_authors_report_for_llama_2_7b(
    share: float, width: int, linears: float, total: float, of_dense: float
) -> None:
    """Their `slice` is no share of the parameters: cutting 10 % of the channels makes the model larger."""
    budget = Budget.of(LLAMA_7B)
    assert widths_of_slice(4096, 32, share) == (4096, *[width] * 63, 4096)
    theirs = (*[width] * 64, 4096)
    without_shortcuts = sum(sliced_size(module, theirs) for module in budget.modules)
    assert 100 * without_shortcuts / budget.dense_parameters == pytest.approx(linears, abs=0.06)
    assert reference_total(LLAMA_7B, width) == pytest.approx(total, abs=0.005e9)
    dense = budget.dense_parameters + OTHER_7B
    assert 100 * reference_total(LLAMA_7B, width) / dense == pytest.approx(of_dense, abs=0.06)


def test_a_slice_is_followed_whatever_the_ratio() -> None:
    model = sliced(a_model("llama", torch.float32), "llama", ratio=90, slice=0.3)
    assert model.model.layers[0].attention_shortcut.weight.shape == (40, 64)  # 8 floor(0.7 x 64 / 8)
    with pytest.raises(RankwiseError, match=r"`slice: 0\.9` leaves fewer than 8 of 64 channels"):
        widths_of_slice(64, 2, 0.9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_reads_back_and_generates_with_its_cache(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    model = sliced(a_model(kind, dtype), kind, ratio=30)
    save_checkpoint(model, tmp_path / "tokenizer", tmp_path / "checkpoint")
    again = load_checkpoint(tmp_path / "checkpoint", dtype)
    blocks = {type(block).__name__ for block in again.get_submodule(family_of(again).blocks).children()}
    assert blocks <= set(again._no_split_modules), "or a map of devices would part them"
    logits = again(OTHERS).logits
    assert torch.equal(logits, model(OTHERS).logits)
    assert logits.isfinite().all()

    cache = again(OTHERS[:, :6], use_cache=True).past_key_values
    steps = [again(OTHERS[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(6, 11)]
    close = {"rtol": 0, "atol": 1e-4 if dtype == torch.float32 else 0.2}
    torch.testing.assert_close(torch.cat(steps, dim=1), logits[:, 6:], **close)
    with_cache, without = (
        again.generate(OTHERS[:1], max_new_tokens=5, do_sample=False, use_cache=cached) for cached in (True, False)
    )
    assert dtype != torch.float32 or torch.equal(with_cache, without)


def test_the_dense_model_is_not_changed_until_its_modules_are_replaced() -> None:
    from lowrank.methods.slicegpt import compress

    model, dense = a_model("llama-gqa", torch.float32), a_model("llama-gqa", torch.float32)
    task = SimpleNamespace(
        settings=SimpleNamespace(slice=None), model=model, budget=Budget.of(ModelShape(**tiny.shape("llama-gqa"))),
        ratio=30, required_tokens=lambda: TOKENS,
    )  # fmt: skip
    replacements = compress(task)  # type: ignore[arg-type]
    assert len(replacements) == tiny.LAYERS * (7 + 2 + 1)
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(OTHERS).logits, dense(OTHERS).logits)


def test_the_order_of_batches_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the last batch, which is smaller."""
    whole = sliced(a_model("mistral"), "mistral")(OTHERS).logits
    monkeypatch.setattr("lowrank.compression.rotation.TOKENS_PER_BATCH", 5 * TOKENS.shape[1])
    parts = sliced(a_model("mistral"), "mistral")(OTHERS).logits
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-5)


def test_ratio_zero_changes_nothing() -> None:
    model = sliced(a_model("llama"), "llama", ratio=0)
    assert torch.equal(model(OTHERS).logits, a_model("llama")(OTHERS).logits)
    assert not any(isinstance(module, GainFreeRMSNorm) for module in model.modules())


def test_a_stream_that_is_not_finite_is_named() -> None:
    model = a_model("llama", torch.float32)
    model.model.layers[1].self_attn.o_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(RankwiseError, match=r"model.layers.1, behind self_attn: .*not finite.*dtype: float32"):
        sliced(model, "llama")


def test_a_budget_that_is_out_of_reach_says_what_stays() -> None:
    with pytest.raises(RankwiseError, match=r"cannot remove 90 %: .*with 8 channels everywhere else \d+\.\d % stays"):
        sliced(a_model("llama"), "llama", ratio=90)


def test_blocks_with_layer_norm_are_refused_by_family() -> None:
    with pytest.raises(RankwiseError, match=r"family 'opt' cannot be rotated: LayerNorm"):
        sliced(tiny.model("opt"), "opt")


def test_a_preset_needs_calibration_windows() -> None:
    from lowrank.methods.slicegpt import Settings

    assert Settings.reads == ("tokens",)
    task = {"model": a_model("llama"), "budget": Budget.of(ModelShape(**tiny.shape("llama"))), "ratio": 30, "seed": 0}
    with pytest.raises(RankwiseError, match="has no calibration windows"):
        compress_model("slicegpt", {"kind": "slicegpt", "calibration": "c"}, task)
