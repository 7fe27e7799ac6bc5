"""How many GPUs each job gets: what the site hands out, or as many as hold its model (`gpus_per_job: auto`).

A job either shares its work among GPUs that hold a model each, a process a GPU; or one process spreads one model over
all of them; or (post-training by ZeRO's third stage) a process a GPU holds its part of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowrank.cluster.needs import GIB, Need
from lowrank.errors import RankwiseError

AUTO = "auto"


@dataclass(frozen=True)
class Given:
    """The GPUs of a job.

    Attributes:
        gpus: all of them; 0: it computes on processors.
        over: how many hold one model; more than one: its blocks lie on them, and one process runs them all.
    """

    gpus: int = 0
    over: int = 1

    @property
    def processes(self) -> int:
        """That share the work."""
        return self.gpus // self.over if self.gpus else 1


@dataclass(frozen=True)
class Dealing:
    """What a site hands out.

    Attributes:
        each: GPUs of a job that computes on them; None: as many as hold its model.
        memory: bytes of one GPU; None: not said, so that nothing is spread, and nothing refused.
        most: GPUs of one node.
    """

    each: int | None = 1
    memory: float | None = None
    most: int = 1

    def given(self, rule: str, need: Need) -> Given:
        """The GPUs of a job.

        Raises:
            RankwiseError: it cannot fit; with what to change.
        """
        if not need.gpu or self.each == 0:
            return Given()
        if self.each and need.divides and need.divides % (processes := need.gpus(self.each)):
            raise RankwiseError(
                f"{rule}: {processes} GPUs for {need.divides} micro-batches a step (`batch_size` / `micro_batch_size` "
                f"of its `tuning`), which do not share them evenly. Give it another number: "
                f"{', '.join(str(n) for n in range(1, need.divides + 1) if not need.divides % n)}"
            )
        if self.memory is None:
            return Given(need.gpus(self.each or 1))
        most = self.most if self.each is None else self.each
        over = need.fewest_gpus(self.memory, most)
        if over is None:
            raise RankwiseError(self._complaint(rule, need))
        if need.evenly:
            return Given(over if self.each is None else self.each)
        if over > 1:
            return Given(over, over)
        return Given(need.gpus(1 if self.each is None else self.each))

    def on(self, rule: str, need: Need, gpus: int) -> Given:
        """Of a rule that the profile gives so many.

        Raises:
            RankwiseError: they do not hold it.
        """
        given = Dealing(gpus, self.memory, gpus).given(rule, need)
        spreads = need.spreads and (given.over > 1 or not need.shared)
        return Given(given.gpus and gpus, gpus if spreads and gpus else 1)

    def _complaint(self, rule: str, need: Need) -> str:
        assert self.memory is not None
        part, size = max(need.device.items(), key=lambda item: item[1])
        told = (
            f"{rule} needs {need.gpu_bytes / GIB:.0f} GiB on a GPU ({part}: {size / GIB:.0f} GiB), and one has "
            f"{self.memory / GIB:.0f} (`gpu_memory`)"
        )
        otherwise = need.remedy or "Take GPUs with more memory."
        if not need.split:
            return f"{told}. {otherwise}"
        enough = need.fewest_gpus(self.memory, most := max(need.blocks, 1))
        if enough is None:
            rest = need.gpu_bytes_of(most) / GIB
            return f"{told}; {rest:.0f} GiB are needed on one however many hold the model. {otherwise}"
        if self.each is not None:
            return f"{told}. {enough} hold it: say `gpus_per_job: {AUTO}`, or set the rule's `gpu: {enough}`."
        node = f"a node has {self.most} (`gpus_per_node`). Take larger nodes."
        return f"{told}; {enough} would hold it, and {node} {otherwise}"


def require_memory(rule: str, need: Need, gpus: int, processes: int, memory: float, name: str) -> None:
    """See that a node has the main memory of a job.

    Args:
        rule: of the job.
        need: what it needs.
        gpus, processes: of one node, as in `Need.host_bytes`.
        memory: bytes of a node.
        name: what says how many there are, for errors.

    Raises:
        RankwiseError: it needs more; with both numbers and what takes most.
    """
    needed = need.host_bytes(gpus, processes)
    if needed <= memory:
        return
    part, size = need.largest_in_main_memory(gpus)
    several = f", in {processes} processes" if processes > 1 else ""
    fewer = "Give it fewer GPUs or processes a node, or take" if processes > 1 else "Take"
    raise RankwiseError(
        f"{rule} needs {needed / GIB:.0f} GiB of main memory{several} ({part}: {size / GIB:.0f} GiB), and a node has "
        f"{memory / GIB:.0f} (`{name}`). {fewer} nodes with more memory."
    )
