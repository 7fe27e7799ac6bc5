"""Peaks of resident memory of the stages' work on a random model, above what was there before: printed as JSON.

    python peaks.py FOLDER

A process of its own, with one thread, in which large tensors go back to the system when they are freed
(MALLOC_MMAP_THRESHOLD_), so that a resident set follows the tensors that live.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = {
    "family": "llama",
    "layers": 4,
    "hidden": 384,
    "intermediate": 1024,
    "heads": 6,
    "kv_heads": 3,
    "head_dim": 64,
    "vocabulary": 20_000,
    "tied_embeddings": False,
}
WINDOWS, LENGTH = 4, 1024
LAYERS_PER_PASS = 3
CPU = torch.device("cpu")


def model() -> LlamaForCausalLM:
    """In float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SHAPE["vocabulary"],
        hidden_size=SHAPE["hidden"],
        intermediate_size=SHAPE["intermediate"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        num_key_value_heads=SHAPE["kv_heads"],
        head_dim=SHAPE["head_dim"],
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def resident(what: str) -> int:
    """A line of this process's status, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(what)


def peak_of(work: Callable[[], Any]) -> int:
    """Bytes that came on top while it ran."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def main(folder: Path) -> dict[str, int]:
    """Each piece of work, after a small one of its kind that loads what it needs of the libraries."""
    from lowrank.bases.block import bases_of_block
    from lowrank.bases.principal import Bases
    from lowrank.calibration.output_gradients import collect_output_gradients
    from lowrank.calibration.statistics import collect_statistics, load_moments
    from lowrank.config.presets import Covariance
    from lowrank.config.sources import ModelShape
    from lowrank.evaluation.perplexity import evaluate_perplexity
    from lowrank.files import layer_name, save_tensors
    from lowrank.model.checkpoint import family_of
    from lowrank.ranks.budget import Budget
    from lowrank.search.objective import Objective
    from lowrank.search.sliced_model import SlicedModel

    one = model()
    family, covariance = family_of(one), Covariance(estimator="naive")
    tokens = torch.randint(SHAPE["vocabulary"], (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    few, held, made = tokens[:1, :16], LAYERS_PER_PASS, folder / "bases"

    def bases(layer: int) -> None:
        block = one.get_submodule(f"{family.blocks}.{layer}")
        linears: Any = {kind: block.get_submodule(kind.path) for kind in family.types}
        parts = {kind.name: (kind.site, linear.weight, linear.bias) for kind, linear in linears.items()}
        moments = load_moments(folder / "all" / layer_name(layer), family.sites)
        save_tensors(made / layer_name(layer), bases_of_block(parts, moments, covariance, CPU, "block"))

    collect_statistics(one, few, held, folder / "few", CPU)
    collect_output_gradients(one, few, held, folder / "few-gradients", CPU)
    found = {"collect_statistics": peak_of(lambda: collect_statistics(one, tokens, held, folder / "all", CPU))}
    found["collect_gradients"] = peak_of(
        lambda: collect_output_gradients(one, tokens[:1], held, folder / "gradients", CPU)
    )
    for layer in range(SHAPE["layers"]):
        bases(layer)
    evaluate_perplexity(one, few)
    found["evaluate_perplexity"] = peak_of(lambda: evaluate_perplexity(one, tokens[:2]))

    def search() -> None:
        sliced = SlicedModel(one, Budget.of(ModelShape(**SHAPE)), Bases(made, SHAPE["layers"]))
        Objective(sliced, tokens[:2], 1.0, CPU).evaluate({})

    found["search_allocation"] = peak_of(search)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("PEAKS " + json.dumps(main(Path(sys.argv[1]))))
