"""The choice of validation windows as its rule runs it: scored, in one go or several, and the extremes kept, or all."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from lowrank.bases.principal import Bases
from lowrank.calibration.corpora import sample_windows
from lowrank.config.presets import Validation
from lowrank.config.sources import ModelShape
from lowrank.files import load_tensors, sha256_file
from lowrank.model.checkpoint import replace_modules
from lowrank.ranks.budget import Budget
from lowrank.search import validation as scoring
from lowrank.search.allocation import sliced_factors
from lowrank.search.kept_ratios import SearchSpace
from lowrank.search.validation import candidate_windows, select_windows
from tests import tiny
from tests.unit.search.test_search import tiny_bases
from tests.unit.search.test_search_stage import Named

STAGE = Path(__file__).parents[3] / "workflow_scripts/stages/select_validation.py"
WINDOWS, LENGTH = 6, 20
SCORED = {"allocations": 3, "groups": 2, "calibration": "c", "covariance": "c", "keep": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its bases, and a corpus."""
    made = tmp_path_factory.mktemp("inputs")
    tiny.model("llama-gqa").save_pretrained(made / "model")
    tiny.tokenizer().save_pretrained(made / "model")
    tiny_bases("llama-gqa", made)
    (made / "data").mkdir()
    data = made / "data/text.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()))
    record = {"kind": "text", "file": "text.jsonl", "sha256": sha256_file(data)}
    (made / "text.json").write_text(json.dumps(record))
    (made / "inputs.json").write_text("{}")
    return made


def documents() -> list[str]:
    return [" ".join(tiny.WORDS[(start + step) % len(tiny.WORDS)] for step in range(60)) for start in range(20)]


def rebuilt_perplexities(folder: Path, windows: torch.Tensor) -> torch.Tensor:
    """Allocations x windows, each of a model with the factors in its layers, from all logits."""
    budget, rows = Budget.of(ModelShape(**tiny.shape("llama-gqa"))), []
    space = SearchSpace(budget, 20, SCORED["groups"], ("v",), lower=0.2)
    for x in space.sample(SCORED["allocations"], 4):
        model, bases = tiny.model("llama-gqa"), Bases(folder / "bases", tiny.LAYERS)
        replace_modules(model, sliced_factors(bases, model, budget, space.ranks(x)))
        logits = model(windows).logits[:, :-1].double()
        rows.append(functional.cross_entropy(logits.mT, windows[:, 1:], reduction="none").mean(1).exp())
    return torch.stack(rows)


def run(folder: Path, out: Path, select: dict[str, Any], **inputs: str) -> tuple[torch.Tensor, dict[str, Any]]:
    """Run the stage; returns the tokens and the record."""
    validation = Validation.model_validate(
        {"corpora": ["text"], "windows": WINDOWS, "length": LENGTH, "seed": 4, "select": select}
    )
    settings = {"model": "tiny", "dtype": "float32", "shape": tiny.shape("llama-gqa"), "validation": validation.plain()}
    if not validation.select.scores:
        settings = {name: settings[name] for name in ("model", "validation")}
    settings |= {"state": str(out / "state")}
    files = {"model": str(folder / "model"), "model_manifest": str(folder / "inputs.json")}
    if "bases" in inputs:
        files |= {"bases_manifest": str(folder / "inputs.json")}
    output = Named(tokens=str(out / "tokens.safetensors"), record=str(out / "record.json"))
    job = Named(
        **{"rule": "select_validation", "threads": 1, "log": [], "resources": {}, "output": output},
        input=Named(corpora=[str(folder / "text.json")], **files, **inputs),
        wildcards=Named(model="tiny", validation="v"),
        params=Named(settings=settings),
    )
    runpy.run_path(str(STAGE), init_globals={"snakemake": job})
    return load_tensors(output.tokens)["tokens"], json.loads(Path(output.record).read_text())


def test_all_windows_are_kept_without_a_model_or_bases(folder: Path, tmp_path: Path) -> None:
    tokens, record = run(folder, tmp_path, {"strategy": "all"})
    assert torch.equal(tokens, sample_windows(documents(), tiny.tokenizer(), WINDOWS, LENGTH, 4))
    assert record["scored"] is False
    assert (record["windows"], record["allocations"]) == (list(range(WINDOWS)), 0)
    assert record["variance"] is record["mean_perplexity"] is None
    assert record["environment"]["device"] == "cpu"


def test_scored_windows_are_those_whose_perplexity_varies_most_or_least(folder: Path, tmp_path: Path) -> None:
    every = sample_windows(documents(), tiny.tokenizer(), WINDOWS, LENGTH, 4)
    perplexities = rebuilt_perplexities(folder, every.long())
    variance = perplexities.var(0).tolist()
    assert min(variance) > 0
    for strategy in ("top", "bottom"):
        (tmp_path / strategy).mkdir()
        select = SCORED | {"strategy": strategy}
        tokens, record = run(folder, tmp_path / strategy, select, bases=str(folder / "bases"))
        assert record["variance"] == pytest.approx(variance, rel=1e-2)
        assert record["mean_perplexity"] == pytest.approx(perplexities.mean(0).tolist(), rel=1e-4)
        extremes = sorted(range(WINDOWS), key=lambda window: variance[window], reverse=strategy == "top")[:2]
        assert record["windows"] == sorted(extremes)
        assert torch.equal(tokens, every[sorted(extremes)])
        assert (record["scored"], record["allocations"]) == (True, 3)


def test_a_stopped_choice_goes_on_after_the_last_allocation(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    losses_of, scored, stops = scoring.window_losses, [], [True]

    def counted(*arguments: Any) -> torch.Tensor:
        if len(scored) == 2 and stops:
            raise KeyboardInterrupt
        scored.append(arguments)
        return losses_of(*arguments)

    def choose(name: str) -> dict[str, bytes]:
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        run(folder, out, SCORED, bases=str(folder / "bases"))
        assert not list((out / "state").iterdir())
        return {file: (out / file).read_bytes() for file in ("tokens.safetensors", "record.json")}

    whole = choose("whole")
    monkeypatch.setattr(scoring, "window_losses", counted)
    with pytest.raises(KeyboardInterrupt):
        choose("stopped")
    stops.clear()
    kept = sorted((tmp_path / "stopped/state").glob("*/allocation_*"))
    assert [file.stem for file in kept] == ["allocation_0", "allocation_1"]
    intact = kept[1].read_bytes()
    kept[1].write_bytes(intact[:-1])
    with pytest.raises(SystemExit):
        choose("stopped")
    assert f"Delete {kept[1].parent} and run the workflow again" in caplog.text
    kept[1].write_bytes(intact)
    assert choose("stopped") == whole
    assert len(scored) == SCORED["allocations"], "none is scored twice"


def test_candidates_come_from_all_corpora_in_equal_numbers() -> None:
    corpora, tokenizer = [documents()[:10], documents()[10:]], tiny.tokenizer()
    preset = {"corpora": ["a", "b"], "length": LENGTH, "seed": 4, "select": {"strategy": "all"}}

    def drawn(count: int) -> torch.Tensor:
        return candidate_windows(corpora, tokenizer, Validation.model_validate(preset | {"windows": count}))

    first, second = (sample_windows(texts, tokenizer, 3, LENGTH, 4) for texts in corpora)
    assert torch.equal(drawn(5), torch.cat([first, sample_windows(corpora[1], tokenizer, 2, LENGTH, 4)]))
    assert not torch.equal(first, second)
    assert torch.equal(drawn(1), sample_windows(corpora[0], tokenizer, 1, LENGTH, 4))


def test_equal_windows_are_kept_in_their_order() -> None:
    settings = Validation.model_validate({"corpora": ["text"], "windows": 4, "length": LENGTH, "select": SCORED}).select
    assert select_windows(torch.tensor([[1.0, 5, 1, 5], [1, 9, 1, 9]]), settings) == [1, 3]
    assert select_windows(torch.ones(3, 4), settings) == [0, 1]
