"""What came out: for each model and ratio the best method by perplexity, its price, and what it changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lowrank.config.outputs import Row
from lowrank.paper.page.results import DECODE, PARAMETERS, PREFILL, SIZE, Checkpoint
from lowrank.paper.tables.accuracy import LEEWAY
from lowrank.paper.tables.best import difference, no_better_than_a_guess
from lowrank.paper.tables.differences import Difference
from lowrank.paper.tables.measures import Measure
from lowrank.paper.tables.rows import estimate_text, number_text

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Winner:
    """The lowest perplexity of a block on one corpus.

    Attributes:
        corpus: its name, with the suite where several judge by it.
        row: what has it.
        perplexity: with its error.
        price: what it is of the dense model's (`× 1.88`), and `rise`, of the loss; empty if that was not measured.
        ahead: of whom, or from whom it cannot be told apart; `by` how much, empty where nobody is behind.
        clear: whether it stands out from every other row.
        guess: whether even the best is no better than a guess.
    """

    corpus: str
    row: Row
    perplexity: str
    price: str
    rise: str
    ahead: str
    by: str
    clear: bool
    guess: bool

    @property
    def title(self) -> str:
        """Its name."""
        return self.row.title


@dataclass(frozen=True)
class Change:
    """A size or a speed of the dense model and of a compressed one.

    Attributes:
        name: what it is.
        before, after, change: in words.
        worse: whether compression made it larger, or slower, as far as the printed digits tell.
        counted: whether it is exact; a speed is the median of a few runs.
    """

    name: str
    before: str
    after: str
    change: str
    worse: bool
    counted: bool


@dataclass(frozen=True)
class Verdict:
    """The winners of one model and ratio, and what those change that are no guess: title -> sizes and speeds.

    Attributes:
        compared: number of rows that were ranked on some corpus.
    """

    model: str
    ratio: int
    compared: int
    winners: Sequence[Winner]
    changes: Mapping[str, Sequence[Change]]


def verdicts(
    found: Sequence[Checkpoint], measures: Sequence[Measure], vocabularies: Mapping[str, int]
) -> list[Verdict]:
    """One for each model and ratio of which some perplexity was measured, in order.

    Args:
        found: all checkpoints.
        measures: of which perplexities count.
        vocabularies: model -> number of tokens, the perplexity of a guess.
    """
    made = []
    for block in dict.fromkeys(each.block for each in found if each.row.ratio):
        members = [each for each in found if each.block == block]
        dense = next((each for each in found if each.row.model == block[0] and each.row.ratio == 0), None)
        winners: list[Winner] = []
        best: dict[str, Checkpoint] = {}
        compared: set[tuple[str, str]] = set()
        for measure in measures:
            rivals = [each for each in members if measure.key in each.values and each.kept <= 100 - block[1] + LEEWAY]
            if measure.kind == "perplexity" and rivals:
                first = min(rivals, key=lambda each: each.values[measure.key].value)
                compared |= {(each.row.method, each.row.tuning) for each in rivals}
                winners.append(_winner(first, rivals, dense, measure, vocabularies[block[0]]))
                if not winners[-1].guess:
                    best[first.row.title] = first
        if winners:
            changes = {title: list(_changes(dense, each)) for title, each in best.items()} if dense else {}
            made.append(Verdict(*block, len(compared), winners, changes))
    return made


def size_text(size: float) -> str:
    """Bytes in GiB or MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"


def _winner(
    first: Checkpoint, rivals: Sequence[Checkpoint], dense: Checkpoint | None, measure: Measure, vocabulary: int
) -> Winner:
    estimate = first.values[measure.key]
    guess = no_better_than_a_guess(estimate, measure, vocabulary)
    others = sorted((each for each in rivals if each is not first), key=lambda each: each.values[measure.key].value)
    behind = [(each, _difference(each, first, measure)) for each in others]
    alike = [each.row.title for each, found in behind if not (found.clear and found.value > 0)]
    return Winner(
        measure.name,
        first.row,
        estimate_text(estimate.value, estimate.stderr, measure.digits),
        *_price(first, dense, measure),
        *_ahead(behind, alike),
        bool(behind) and not alike and not guess,
        guess,
    )


def _difference(one: Checkpoint, other: Checkpoint, measure: Measure) -> Difference:
    return difference(one.results, other.results, measure, one.values[measure.key], other.values[measure.key])


def _price(first: Checkpoint, dense: Checkpoint | None, measure: Measure) -> tuple[str, str]:
    if dense is None or measure.key not in dense.values:
        return "", ""
    ratio = first.values[measure.key].value / dense.values[measure.key].value
    return f"× {number_text(ratio, 2)}", _signed(_difference(first, dense, measure))


def _signed(found: Difference) -> str:
    text = estimate_text(found.value, found.stderr, 3)
    return text.replace("-", "−", 1) if found.value < 0 else f"+{text}"


def _ahead(behind: Sequence[tuple[Checkpoint, Difference]], alike: Sequence[str]) -> tuple[str, str]:
    if not behind:
        return "no other row to compare with", ""
    if alike:
        return f"not told apart from {', '.join(alike)}", ""
    nearest, found = behind[0]
    return nearest.row.title, f"by {estimate_text(found.value, found.stderr, 3)}"


def _changes(dense: Checkpoint, compressed: Checkpoint) -> Iterator[Change]:
    """Size and speed, of what was measured of both."""
    sized = SIZE in dense.cost and SIZE in compressed.cost
    size, name = (SIZE, "weights in memory") if sized else (PARAMETERS, "parameters")
    for key, what in ((size, name), (PREFILL, "tokens/s of a prompt"), (DECODE, "tokens/s generated")):
        if key in dense.cost and key in compressed.cost:
            before, after = dense.cost[key], compressed.cost[key]
            text = {SIZE: size_text, PARAMETERS: _count_text}.get(key, _speed_text)
            ratio = round(after / before, 2)
            counted = key == size
            told = f"{100 * (after / before - 1):+.0f} %".replace("-", "−") if counted else f"× {ratio:.2f}"
            yield Change(what, text(before), text(after), told, ratio > 1 if counted else ratio < 1, counted)


def _count_text(count: float) -> str:
    return f"{count / 1e6:,.1f} M"


def _speed_text(speed: float) -> str:
    return number_text(speed, 1)
