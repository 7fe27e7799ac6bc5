"""What the profile of a site says under `default-resources` and `set-resources`, checked before a job is submitted.

Snakemake takes any name and any value there: a misspelt one would be found by jobs, after hours in the queue, or never.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lowrank.cluster.dealing import AUTO, Dealing, require_memory
from lowrank.cluster.needs import GIB, Need
from lowrank.config.study import suggestion
from lowrank.errors import RankwiseError
from lowrank.jobs.crew import LAUNCHERS

DEFAULTS, RULES = "default-resources", "set-resources"
_NUMBERS = ("gpus_per_job", "gpu_memory", "gpus_per_node", "jobs_per_gpu", "max_mem_mb", "max_runtime")
_NEEDED_BY_AUTO = {"gpu_memory": "GiB of one GPU", "gpus_per_node": "what one job can have at most"}
SEVERAL_NODES = ("collect_statistics", "collect_gradients", "post_train")
"""Rules whose processes meet in a folder that all nodes see; those of others, in one of their own node."""
_GPU_TYPE = r"[A-Za-z0-9_.]+"
"""What the plugin takes for a type of GPU."""


@dataclass(frozen=True)
class Site:
    """The values that rules look up; None where the profile says nothing.

    Attributes:
        gpus_per_job: of a job that computes on GPUs; 0: all compute on processors; `AUTO`: as many as hold its model.
        gpu_memory: of one GPU, GiB.
        gpus_per_node: what one job can have at most, by `AUTO`.
        gpu_type: as the cluster calls it.
        max_mem_mb, max_runtime: what no try asks more than: MB of a node, minutes.
        in_flight: GPUs that all jobs together may hold.
        jobs_per_gpu: jobs that may hold one GPU of the head's own machine at the same time.
    """

    gpus_per_job: int | Literal["auto"] | None = None
    gpu_type: str | None = None
    max_mem_mb: int | None = None
    max_runtime: int | None = None
    in_flight: int | None = None
    jobs_per_gpu: int | None = None
    gpu_memory: int | None = None
    gpus_per_node: int | None = None

    @property
    def dealing(self) -> Dealing:
        """How many GPUs each job gets; none where the profile says nothing."""
        each = None if self.gpus_per_job == "auto" else self.gpus_per_job or 0
        return Dealing(each, None if self.gpu_memory is None else self.gpu_memory * GIB, self.gpus_per_node or 1)

    def check_memory(self, rule: str, need: Need, gpus: int, processes: int) -> None:
        """See that a node holds a job, if the profile says how much memory the largest has.

        Raises:
            RankwiseError: see `require_memory`.
        """
        if self.max_mem_mb is not None:
            require_memory(rule, need, gpus, processes, self.max_mem_mb * 1e6, "max_mem_mb")

    def check_gpus(self, rule: str, gpus: int) -> int:
        """The GPUs of a job of a rule, if all in flight are as many: Snakemake would cut them without a word.

        Raises:
            RankwiseError: with both numbers.
        """
        if self.in_flight is not None and gpus > self.in_flight:
            raise RankwiseError(
                f"{rule} asks for {gpus} GPUs, and all jobs together may hold {self.in_flight}. Raise `resources: "
                "gpu:` of the profile, or lower `gpus_per_job` or the rule's `gpu`."
            )
        return gpus


def site_of(defaults: Mapping[str, str], in_flight: str | None) -> Site:
    """What a profile says under `default-resources`.

    Args:
        defaults: name -> value as written.
        in_flight: the profile's `resources: gpu`.

    Raises:
        RankwiseError: every value that cannot be meant, one a line.
    """
    problems = [
        f"{DEFAULTS}.{name}: '{defaults[name]}' is no whole number"
        for name in _NUMBERS
        if name in defaults and not defaults[name].isdigit() and (name, defaults[name]) != ("gpus_per_job", AUTO)
    ]
    if defaults.get("gpus_per_job") == AUTO:
        problems += [
            f"{DEFAULTS}.{name}: missing; `gpus_per_job: {AUTO}` needs it: {what}"
            for name, what in _NEEDED_BY_AUTO.items()
            if name not in defaults
        ]
    problems += [
        f"{DEFAULTS}.{name}: 0; it is {what}"
        for name, what in _NEEDED_BY_AUTO.items()
        if re.fullmatch("0+", defaults.get(name, ""))
    ]
    if re.fullmatch("0+", defaults.get("jobs_per_gpu", "")):
        problems.append(f"{DEFAULTS}.jobs_per_gpu: 0; a GPU serves at least one job")
    for name, known in (("launcher", LAUNCHERS), ("device", ("cpu",))):
        if name in defaults and defaults[name] not in known:
            is_one = f"is {' or '.join(known)}"
            problems.append(f"{DEFAULTS}.{name}: '{defaults[name]}'; it {is_one}, or left out")
    if not re.fullmatch(_GPU_TYPE, defaults.get("gpu_type", "any")):
        problems.append(
            f"{DEFAULTS}.gpu_type: '{defaults['gpu_type']}'; SLURM's plugin takes letters, digits, dots and underscores"
        )
    if in_flight is not None and not in_flight.isdigit():
        problems.append(f"resources.gpu: '{in_flight}' is no whole number")
    _refuse(problems)
    numbers: dict[str, Any] = {
        name: AUTO if defaults[name] == AUTO else int(defaults[name]) for name in _NUMBERS if name in defaults
    }
    return Site(gpu_type=defaults.get("gpu_type"), in_flight=int(in_flight) if in_flight else None, **numbers)


def check_rules(named: Mapping[str, Mapping[str, str]], rules: Collection[str]) -> None:
    """Stop if `set-resources` is about a rule that there is not, or gives several nodes to one that works on one.

    Args:
        named: rule -> name -> value as written.
        rules: all that there are.

    Raises:
        RankwiseError: with every such name.
    """
    problems = [
        f"{RULES}.{name}: there is no such rule{suggestion(name, list(rules))}" for name in named if name not in rules
    ]
    problems += [
        f"{RULES}.{name}.nodes: '{values['nodes']}'; jobs of this rule run on one node, so leave it out. On several: "
        f"{', '.join(SEVERAL_NODES)} (docs/cluster.md)"
        for name, values in named.items()
        if name in rules and name not in SEVERAL_NODES and values.get("nodes", "1") != "1"
    ]
    _refuse(problems)


def whole_number(rule: str, name: str, value: str) -> int:
    """A number of `set-resources`.

    Raises:
        RankwiseError: it is none.
    """
    if not value.isdigit() or (name != "gpu" and not int(value)):
        _refuse([f"{RULES}.{rule}.{name}: '{value}' is no whole number{' of at least 1' if name != 'gpu' else ''}"])
    return int(value)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise RankwiseError("\n".join(["the profile, or the command line, has what cannot be meant:", *problems]))
