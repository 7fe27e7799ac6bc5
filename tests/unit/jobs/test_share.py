"""Work that is shared gives what one process gives: statistics, gradients, losses, answers; also after a kill."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lowrank.calibration import output_gradients, statistics
from lowrank.calibration.output_gradients import collect_output_gradients
from lowrank.calibration.statistics import collect_statistics
from lowrank.errors import RankwiseError
from lowrank.evaluation.answer_scorer import AnswerScorer
from lowrank.evaluation.perplexity import evaluate_perplexity
from lowrank.evaluation.zero_shot import evaluate_zero_shot
from lowrank.jobs.share import ALONE, Share
from tests import tiny
from tests.unit.evaluation.test_zero_shot import METRICS, ROWS, make_suite, write_rows
from tests.unit.jobs.shares import together

CPU = torch.device("cpu")
COLLECTORS = {
    "statistics": (collect_statistics, statistics),
    "gradients": (collect_output_gradients, output_gradients),
    "drawn gradients": (partial(collect_output_gradients, draws=2), output_gradients),
}


def some_tokens(windows: int = 7, length: int = 12) -> torch.Tensor:
    return torch.randint(2, 400, (windows, length), generator=torch.Generator().manual_seed(1))


@given(count=st.integers(0, 50), world=st.integers(1, 9))
def test_every_thing_is_in_one_share(count: int, world: int) -> None:
    parts = [Share(rank, world).of(count) for rank in range(world)]
    assert [index for part in parts for index in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_alone_a_sum_is_the_thing_itself() -> None:
    part = torch.tensor([1.0, 2.0])
    assert ALONE.sum(part) is part
    assert part.tolist() == [1.0, 2.0]


def test_gpus_add_up_tensors_of_the_main_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processes that hold the same, by a copy on the GPU."""
    moved: list[torch.Tensor] = []

    def to_gpu(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        assert device.type == "cuda"
        moved.append(tensor.clone())
        return moved[-1]

    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))
    monkeypatch.setattr(torch.Tensor, "to", to_gpu)
    part = torch.tensor([1.0, 2.0])
    assert Share(0, 2).sum(part) is part
    assert part.tolist() == [2.0, 4.0]
    assert len(moved) == 1


def tensors_of(files: list[Path]) -> dict[tuple[str, str], torch.Tensor]:
    return {(file.name, name): tensor for file in files for name, tensor in load_file(file).items()}


def assert_close(found: list[Path], expected: list[Path]) -> None:
    """To 1e-6 of the largest value of each tensor; integers are equal."""
    ours, theirs = tensors_of(found), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        size = float(tensor.abs().max())
        assert size > 0
        assert float((ours[key].double() - tensor.double()).abs().max()) <= 1e-6 * size, key


@pytest.mark.parametrize("what", COLLECTORS)
@pytest.mark.parametrize("kind", ["llama-gqa", "opt"])
@pytest.mark.parametrize(
    ("world", "batch"), [(2, 12), (3, 24), (9, 12)]
)  # batches of one window, of two; too many hands
def test_shares_add_up_to_the_whole(
    what: str, kind: str, world: int, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect, module = COLLECTORS[what]
    monkeypatch.setattr(module, "TOKENS_PER_BATCH", batch)
    tokens = some_tokens()
    whole = collect(tiny.model(kind), tokens, 1, tmp_path / "whole", CPU)
    models = [tiny.model(kind) for _ in range(world)]  # a process has its own: hooks are set on it
    shared = together(world, lambda share: collect(models[share.rank], tokens, 1, tmp_path / "shared", CPU, share))
    assert all(files == shared[0] for files in shared)
    assert_close(shared[0], whole)


@pytest.mark.parametrize("what", COLLECTORS)
def test_another_number_of_processes_goes_on_where_one_was_killed(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect, module = COLLECTORS[what]
    monkeypatch.setattr(module, "TOKENS_PER_BATCH", 12)
    tokens, done = some_tokens(), []
    whole = collect(tiny.model("llama"), tokens, 1, tmp_path / "whole", CPU)
    inner = "_run_block" if what == "statistics" else "backpropagate"
    plain = getattr(module, inner)

    def killed(*args: Any) -> Any:
        done.append(args)
        if len(done) >= 10:  # seven windows of the first group, and some of the second
            deadline = time.monotonic() + 60
            while not list((tmp_path / "cut").glob("layer_*.safetensors")):  # the first process may be writing it yet
                assert time.monotonic() < deadline
                time.sleep(0.01)
            raise KeyboardInterrupt
        return plain(*args)

    models = [tiny.model("llama") for _ in range(3)]
    monkeypatch.setattr(module, inner, killed)
    with pytest.raises(KeyboardInterrupt):
        together(3, lambda share: collect(models[share.rank], tokens, 1, tmp_path / "cut", CPU, share))
    assert len(list((tmp_path / "cut").glob("layer_*"))) == 1
    done.clear()
    models = [tiny.model("llama") for _ in range(2)]
    resumed = together(2, lambda share: collect(models[share.rank], tokens, 1, tmp_path / "cut", CPU, share))
    assert len(done) == 7  # only the second group
    assert_close(resumed[0], whole)


def test_the_message_of_the_process_that_met_damage_is_told(tmp_path: Path) -> None:
    models = [tiny.model("llama") for _ in range(2)]
    models[1].model.layers[1].mlp.up_proj.weight.data[:] = float("inf")
    with pytest.raises(RankwiseError, match=r"model\.layers\.1\.mlp\.down_proj: inputs are not finite"):
        together(2, lambda share: collect_statistics(models[share.rank], some_tokens(), 2, tmp_path, CPU, share))


@pytest.mark.parametrize("world", [2, 3, 9])
@pytest.mark.parametrize("stride", [None, 5])
def test_losses_of_windows_stand_side_by_side(world: int, stride: int | None) -> None:
    """To the last bit: batches are those of one process."""
    one, windows = tiny.model("llama-gqa"), some_tokens().unfold(1, 12, 1).flatten(0, 1)
    whole = evaluate_perplexity(one, windows, stride, batch_tokens=24)
    shared = together(world, lambda share: evaluate_perplexity(one, windows, stride, batch_tokens=24, share=share))
    assert all(losses == whole for losses in shared)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 5])
def test_answers_are_those_of_one_process(world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, whichever process ran a batch, and each ran some."""
    plain, ran = AnswerScorer._answers, set()

    def counted(scorer: AnswerScorer, batch: Any) -> Any:
        if scorer.share.world > 1:
            ran.add(scorer.share.rank)
        return plain(scorer, batch)

    monkeypatch.setattr(AnswerScorer, "_answers", counted)
    tasks = {name: METRICS[name] for name in ("hellaswag", "boolq")}
    rows = {task: write_rows(tmp_path, task, ROWS[task]) for task in tasks}
    suite, tokenizer = make_suite(tasks, batch_tokens=50), tiny.tokenizer()
    model = tiny.model("llama", len(tokenizer))
    whole = evaluate_zero_shot(model, tokenizer, suite, rows, 512)
    shared = together(world, lambda share: evaluate_zero_shot(model, tokenizer, suite, rows, 512, share))
    assert all(found == whole for found in shared)
    assert len(ran) == world


def test_a_model_without_numbers_is_told_from_a_batch_of_another_process(tmp_path: Path) -> None:
    rows = {"boolq": write_rows(tmp_path, "boolq", ROWS["boolq"])}
    suite, tokenizer = make_suite({"boolq": "acc"}), tiny.tokenizer()
    model = tiny.model("llama", len(tokenizer))
    model.lm_head.weight[:] = float("nan")
    with pytest.raises(RankwiseError, match="task 'boolq': the model's log-likelihoods are not finite"):
        together(2, lambda share: evaluate_zero_shot(model, tokenizer, suite, rows, 512, share))
