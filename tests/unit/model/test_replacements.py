"""Every kind of recipe entry on every family it applies to: the checkpoint opens here and elsewhere, with equal logits.

The model under test is dense, randomly changed by replacements of one kind and of the kinds that it cannot do without.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import DynamicCache, PreTrainedModel

from lowrank.compression.branches import Structure
from lowrank.compression.structured import cut
from lowrank.config.sources import ModelShape
from lowrank.model.checkpoint import family_of, load_checkpoint, recipe_of, replace_modules, save_checkpoint
from lowrank.model.factors import LowRankFactors
from lowrank.model.families import FAMILIES
from lowrank.model.replacements import NormWithoutGain, Replacement, ResidualShortcuts, SmallerLinear
from lowrank.ranks.budget import Budget
from tests import tiny

OUTSIDE = """
import json, sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
assert not any("workflow_scripts" in path for path in sys.path)
answers = {}
for folder in sys.argv[1:]:
    probe = load_file(folder + "/probe.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    cached, plain = (
        model.generate(probe["ids"], max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    answers[folder] = {
        "class": type(model).__module__,
        "logits": torch.equal(model(probe["ids"]).logits, probe["logits"]),
        "generated": torch.equal(cached, probe["generated"]) and torch.equal(plain, cached),
        "recipe": model.config.recipe,
    }
print(json.dumps(answers))
"""


def random_weight(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(rows, columns, generator=generator) / 8


def linear(model: PreTrainedModel, structure: Structure, generator: torch.Generator) -> dict[str, Replacement]:
    """MLPs of another width each, with biases that the dense layers lack; o gets a bias and keeps its width."""
    replacements: dict[str, Replacement] = {}
    for layer, width in enumerate((88, 40)):
        for name in (*structure.mlp.writers, structure.mlp.reader):
            m, n = (tiny.HIDDEN, width) if name is structure.mlp.reader else (width, tiny.HIDDEN)
            replacements[structure.layer_name(layer, name)] = SmallerLinear(
                random_weight(m, n, generator), torch.randn(m, generator=generator)
            )
        reader = structure.layer_name(layer, structure.attention.reader)
        replacements[reader] = SmallerLinear(
            model.get_submodule(reader).weight, torch.randn(tiny.HIDDEN, generator=generator)
        )
    return replacements


def heads(model: PreTrainedModel, structure: Structure, generator: torch.Generator) -> dict[str, Replacement]:
    """Each block with other heads: the last group of the first, and all but the first group of the second."""
    groups = torch.arange(structure.attention.units)
    return cut(model, structure, {(0, "attention"): groups[-1:], (1, "attention"): groups[1:]})


def norm_names(model: PreTrainedModel) -> list[str]:
    """Block norms and the final one; norms of single heads are left out."""
    norms = [name for name, _ in model.named_modules() if name.endswith("norm")]
    return [name for name in norms if not name.endswith(("q_norm", "k_norm"))]


def rms_norm(model: PreTrainedModel, structure: Structure, generator: torch.Generator) -> dict[str, Replacement]:
    """All norms without gain, with a divisor and an epsilon of their own."""
    return {name: NormWithoutGain(tiny.HIDDEN + i, 10.0**-i) for i, name in enumerate(norm_names(model), start=1)}


def shortcuts(model: PreTrainedModel, structure: Structure, generator: torch.Generator) -> dict[str, Replacement]:
    """A residual stream of another width at every step; the last block leaves with all channels."""
    replacements: dict[str, Replacement] = {}
    for layer, (entered, between, left) in enumerate(((tiny.HIDDEN, 48, 40), (40, 32, tiny.HIDDEN))):
        read, written = {"self_attn": entered, "mlp": between}, {"o_proj": between, "down_proj": left}
        for name, module in model.model.layers[layer].named_modules():
            full, parent, child = f"model.layers.{layer}.{name}", name.partition(".")[0], name.rpartition(".")[2]
            if child.endswith("layernorm"):
                replacements[full] = NormWithoutGain(tiny.HIDDEN, 1e-5)
            elif child in written:
                weight = random_weight(written[child], module.in_features, generator)
                replacements[full] = SmallerLinear(weight, None if module.bias is None else module.bias[: len(weight)])
            elif isinstance(module, torch.nn.Linear):
                weight = random_weight(module.out_features, read[parent], generator)
                replacements[full] = SmallerLinear(weight, module.bias)
        replacements[f"model.layers.{layer}"] = ResidualShortcuts(
            random_weight(between, entered, generator), random_weight(left, between, generator)
        )
    return replacements


Maker = Callable[[PreTrainedModel, Structure, torch.Generator], dict[str, Replacement]]
KINDS: dict[str, Maker] = {"linear": linear, "heads": heads, "rms_norm": rms_norm, "shortcuts": shortcuts}
CASES = [
    (entry, kind)
    for entry in KINDS
    for kind in {"heads": tiny.HEADS_GO, "shortcuts": tiny.ROTATED}.get(entry, tiny.FEW)
]
"""Where methods are defined: no family whose branches are built otherwise gets shortcuts."""


def changed(entry: str, kind: str) -> PreTrainedModel:
    model = tiny.model(kind)
    structure = Structure.of(Budget.of(ModelShape(**tiny.shape(kind))))
    replace_modules(model, KINDS[entry](model, structure, torch.Generator().manual_seed(7)))
    return model


def probe() -> torch.Tensor:
    return torch.randint(2, 400, (2, 12), generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """One checkpoint a case, with what its model answers beside it."""
    root = tmp_path_factory.mktemp("recipes")
    tiny.tokenizer().save_pretrained(root / "tokenizer")
    folders = {}
    for entry, kind in CASES:
        model = changed(entry, kind)
        folder = folders[entry, kind] = root / f"{entry}-{kind}"
        save_checkpoint(model, root / "tokenizer", folder)
        with torch.inference_mode():
            logits = model(probe()).logits.contiguous()
            generated = model.generate(probe(), max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=True)
        save_file({"ids": probe(), "logits": logits, "generated": generated}, folder / "probe.safetensors")
    return folders


@pytest.fixture(scope="module")
def answers(checkpoints: dict[tuple[str, str], Path]) -> dict[str, dict[str, object]]:
    """What one new process, which knows nothing of this repository, says of all checkpoints."""
    elsewhere = next(iter(checkpoints.values())).parent
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(elsewhere / "modules")}
    run = subprocess.run(
        [sys.executable, "-c", OUTSIDE, *map(str, checkpoints.values())],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, dict[str, object]] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(("entry", "kind"), CASES)
def test_the_change_matters_and_is_written_down(entry: str, kind: str) -> None:
    model, dense = changed(entry, kind), tiny.model(kind)
    assert not torch.allclose(model(probe()).logits, dense(probe()).logits, atol=1e-2)
    assert model(probe()).logits.isfinite().all()
    recipe = recipe_of(model)
    assert entry in {written["kind"] for written in recipe.values()}
    if entry == "heads":
        attention = [name for name, written in recipe.items() if written["kind"] == "heads"]
        assert attention == [f"{family_of(dense).blocks}.{layer}.self_attn" for layer in range(2)]
    if entry == "rms_norm":
        assert len(recipe) == FAMILIES[tiny.shape(kind)["family"]].norms * tiny.LAYERS + 1


@pytest.mark.parametrize(("entry", "kind"), CASES)
def test_a_checkpoint_reads_back_here(entry: str, kind: str, checkpoints: dict[tuple[str, str], Path]) -> None:
    model, again = changed(entry, kind), load_checkpoint(checkpoints[entry, kind], torch.float32)
    assert recipe_of(again) == recipe_of(model)
    assert torch.equal(again(probe()).logits, model(probe()).logits)


@pytest.mark.parametrize(("entry", "kind"), CASES)
def test_a_checkpoint_opens_in_a_process_without_the_repository(
    entry: str,
    kind: str,
    checkpoints: dict[tuple[str, str], Path],
    answers: dict[str, dict[str, object]],
) -> None:
    answer = answers[str(checkpoints[entry, kind])]
    assert str(answer["class"]).startswith("transformers_modules.")
    assert answer["recipe"] == recipe_of(changed(entry, kind))
    assert answer["logits"]
    assert answer["generated"]


@pytest.mark.parametrize(("entry", "kind"), CASES)
def test_the_cache_of_keys_and_values_changes_nothing(
    entry: str, kind: str, checkpoints: dict[tuple[str, str], Path]
) -> None:
    """Token by token with a cache the logits are those of all tokens at once, and generation is the same."""
    model = load_checkpoint(checkpoints[entry, kind], torch.float32)
    ids, cache = probe(), DynamicCache()
    steps = [model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(ids.shape[1])]
    assert cache.get_seq_length() == ids.shape[1]
    assert torch.allclose(torch.cat(steps, dim=1), model(ids).logits, atol=1e-4)
    cached, plain = (
        model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False)
    )
    assert cached.shape[1] == ids.shape[1] + 8
    assert torch.equal(cached, plain)


def test_modules_of_one_make_share_a_class_and_of_others_do_not(tmp_path: Path) -> None:
    """Servers look at one instance of a class; blocks keep theirs, by which loaders know them."""
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    model = tiny.model("llama")
    names = [f"model.layers.{layer}.mlp" for layer in range(2)]
    pair = LowRankFactors(torch.randn(8, tiny.HIDDEN), torch.randn(tiny.INTERMEDIATE, 8))
    replace_modules(model, {f"{names[1]}.up_proj": pair})
    save_checkpoint(model, tmp_path / "tokenizer", tmp_path / "second")
    mixed = load_checkpoint(tmp_path / "second", torch.float32)
    first, second = (type(mixed.get_submodule(name)) for name in names)
    assert (first.__name__, second.__name__) == ("LlamaMLP", "LlamaMLP_up_proj_LowRankLinear")
    assert issubclass(second, first)
    replace_modules(model, {f"{names[0]}.up_proj": pair})
    save_checkpoint(model, tmp_path / "tokenizer", tmp_path / "both")
    alike = load_checkpoint(tmp_path / "both", torch.float32)
    assert {type(alike.get_submodule(name)) for name in names} == {second}
    assert {type(block).__name__ for block in alike.model.layers} == {"LlamaDecoderLayer"}
