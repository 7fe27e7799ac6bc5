"""What each job of a study is expected to need: memory, disk, time. Rules ask for it, and `plan` shows it.

Estimates follow from the config and the models' shapes alone (`sizes`), before anything is downloaded. They are no
limits of the code, and no stage imports this module, so that changing an estimate never runs anything again.
`docs/cluster.md` states the formulas and how far they were checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache

from lowrank.cluster.checkpoint_needs import distillation_need, suite_need, tuning_need
from lowrank.cluster.compression_needs import compression_need, elimination_need
from lowrank.cluster.needs import GIB, PROGRAM, Need, Work
from lowrank.cluster.sizes import (
    DOUBLE,
    GRADIENT_TOKENS,
    HEAD_TOKENS,
    LOSS_TOKENS,
    SINGLE,
    STATISTICS_TOKENS,
    Sizes,
    batch_tokens,
    decomposition,
    either,
    in_dtype,
)
from lowrank.config.outputs import PredictedLossFigure
from lowrank.config.presets import ANY_MULTIPLE, Validation
from lowrank.config.study import Study
from lowrank.config.tuning import FeatureDistillation, Tuning
from lowrank.config.use import SHIPPED
from lowrank.config.zero import zero_of
from lowrank.errors import RankwiseError
from lowrank.model.families import FAMILIES

SEARCH_LIBRARIES = 0.25 * GIB
TEXTS = 0.05 * GIB
"""Of the documents that windows are drawn from; of a whole shard of C4 it is more."""

LAYERS_PER_PASS = {"collect_statistics": 8, "collect_gradients": 4}
"""Rule -> blocks whose accumulators it holds at once, or more of small models, unless the profile says otherwise."""
ACCUMULATORS = 2 * GIB
"""What the accumulators of small models may take: each pass for gradients begins anew at the loss."""
HELD_BY_A_WRITER = 3
"""Blocks' results at once: one is made, one waits, one is written (`jobs.beside`)."""
ACCUMULATORS_SHARE = 0.25
"""Of a GPU whose memory is known, which they may take of any model: more of them would need more GPUs."""
Wildcards = Mapping[str, str]


class Estimator:
    """The needs of the jobs of one study.

    Attributes:
        study: the config.
        gpu_memory: bytes of one GPU, where the profile says so.
        held: rule -> blocks whose accumulators it holds at once, where the profile says so.
    """

    def __init__(self, study: Study, gpu_memory: float | None = None, **held: int) -> None:
        self.study, self.gpu_memory, self.held = study, gpu_memory, held
        self._sizes = cache(self._sizes_of)
        self._needs: dict[tuple[str, tuple[tuple[str, str], ...]], Need] = {}
        self._rules: dict[str, Callable[[Wildcards], Need]] = {
            "fetch_model": self._fetch_model,
            "sample_calibration": self._sample_calibration,
            "collect_statistics": self._collect_statistics,
            "collect_gradients": self._collect_gradients,
            "compute_bases": self._compute_bases,
            "eliminate_neurons": self._eliminate_neurons,
            "select_validation": self._select_validation,
            "measure_sensitivity": self._measure_sensitivity,
            "measure_truncations": self._measure_truncations,
            "search_allocation": self._search_allocation,
            "compress_model": self._compress_model,
            "post_train": self._post_train,
            "distil_features": self._distil_features,
            "evaluate_perplexity": self._evaluate,
            "evaluate_zero_shot": self._evaluate,
            "evaluate_cost": self._evaluate,
            "evaluate_generation": self._evaluate,
        }

    @property
    def rules(self) -> list[str]:
        """The rules that are estimated; the others fetch or compare texts or write tables, and need next to nothing."""
        return list(self._rules)

    def need(self, rule: str, wildcards: Wildcards) -> Need:
        """What a job of a rule needs; Snakemake asks for each of its resources anew."""
        job = rule, tuple(wildcards.items())
        if job not in self._needs:
            estimate = self._rules.get(rule)
            self._needs[job] = estimate(wildcards) if estimate else Need(work=Work(seconds=10))
        return self._needs[job]

    def layers_per_pass(self, rule: str, model: str) -> int:
        """How many blocks of a model have their accumulators in memory at once."""
        sizes = self._sizes(model)
        moments = {"collect_statistics": sizes.moments, "collect_gradients": sizes.output_moments}[rule]
        held = max(LAYERS_PER_PASS[rule], int(ACCUMULATORS // moments(DOUBLE)))
        if self.gpu_memory is not None:
            held = min(held, max(1, int(ACCUMULATORS_SHARE * self.gpu_memory // moments(DOUBLE))))
        return min(self.held.get(rule) or held, sizes.shape.layers)

    def _sizes_of(self, model: str, ratio: int = 0, dtype: str | None = None) -> Sizes:
        section = self.study.models[model]
        return Sizes(section.shape, dtype or section.dtype, 1 - ratio / 100)

    def _checkpoint(self, wildcards: Wildcards) -> Sizes:
        """Of the model that a row of a table is about."""
        return self._sizes(wildcards["model"], int(wildcards["ratio"]))

    def _fetch_model(self, wildcards: Wildcards) -> Need:
        sizes = self._sizes(wildcards["model"])
        weights = sizes.weights
        return Need(
            host={"program": PROGRAM, "a tensor": sizes.head * sizes.number}, disk=weights, work=Work(disk=3 * weights)
        )

    def _sample_calibration(self, wildcards: Wildcards) -> Need:
        calibration = self.study.calibration[wildcards["calibration"]]
        return _sampled(calibration.windows * calibration.length)

    def _collect_statistics(self, wildcards: Wildcards) -> Need:
        calibration = self.study.calibration[wildcards["calibration"]]
        sizes = self._sizes(wildcards["model"])
        tokens, layers = calibration.windows * calibration.length, sizes.shape.layers
        batch, widest = batch_tokens(calibration.length, STATISTICS_TOKENS), max(sizes.inputs)
        held = self.layers_per_pass("collect_statistics", wildcards["model"])
        means = DOUBLE * calibration.windows * sum(sizes.inputs)
        # The inputs in float32, around their mean, and their size; the product of a panel of them is no larger.
        inputs = SINGLE * batch * widest
        update = (2 + sizes.widened) * inputs
        storing = sizes.statistics(calibration.windows) + 2 * DOUBLE * widest**2
        passes = math.ceil(layers / held)
        hidden = sizes.hidden(tokens)
        weights = sizes.number * (sizes.head + held / layers * sizes.linears)
        return Need(
            gpu=True,
            shared=True,
            device={
                "a pass's weights": weights,
                "accumulators": held * (sizes.moments(DOUBLE) + means),
                "update": max(update, storing),
                "activations": sizes.activations(batch),
            },
            remedy="Fewer `layers_per_pass` (`set-resources` of the profile) take less, or larger GPUs.",
            host={
                "program": PROGRAM,
                "other weights": sizes.weights - weights,
                "blocks' statistics": HELD_BY_A_WRITER * sizes.statistics(calibration.windows),
            },
            loading=sizes.weights,
            disk=layers * sizes.statistics_file(calibration.windows),
            scratch=min(passes - 1, 2) * hidden,  # what a pass reads and what it writes
            work=in_dtype(
                sizes,
                sizes.forward(tokens, calibration.length, head=False),
                parts=sizes.input_products(tokens),
                disk=sizes.weights + 2 * (passes - 1) * hidden + 2 * layers * sizes.statistics_file(0),
            ),
        )

    def _collect_gradients(self, wildcards: Wildcards) -> Need:
        calibration = self.study.calibration[wildcards["calibration"]]
        sizes = self._sizes(wildcards["model"])
        layers, windows = sizes.shape.layers, calibration.gradient_windows or calibration.windows
        held = self.layers_per_pass("collect_gradients", wildcards["model"])
        batch = batch_tokens(calibration.length, GRADIENT_TOKENS)
        widest = max(module.out_features for module in sizes.block)
        # The pass for the first blocks goes back through all of them, those for the others through fewer: half of it.
        passes, tokens = math.ceil(layers / held), windows * calibration.length
        draws = calibration.gradient_draws or 1
        through = 1 + draws * (passes + 1) / 2 / passes
        saved = sizes.training_activations(batch)
        return Need(
            gpu=True,
            shared=True,
            device={
                "weights": sizes.weights,
                "accumulators": held * sizes.output_moments(DOUBLE),
                "storing": 2 * DOUBLE * widest**2,
                "activations": saved,
                "logits": sizes.logits(min(batch, HEAD_TOKENS), 2),
            },
            blocks=layers,
            split={"weights": sizes.block_weights, "activations": saved},
            host={"program": PROGRAM, "blocks' gradients": HELD_BY_A_WRITER * sizes.gradients_file},
            loading=sizes.weights,
            disk=layers * sizes.gradients_file,
            work=in_dtype(
                sizes,
                passes * through * sizes.forward(tokens, calibration.length),
                single=sizes.output_products(draws * tokens),
                disk=sizes.weights + 2 * layers * sizes.gradients_file,
            ),
        )

    def _full_bases(self, covariance: str | None) -> bool:
        """Whether bases hold all directions."""
        return covariance is not None and self.study.covariance[covariance].holds_all_directions

    def _stores_projections(self, covariance: str) -> bool:
        """Whether bases hold factors that weights and directions do not tell."""
        return self.study.covariance[covariance].gradients == "weigh"

    def _bases_file(self, sizes: Sizes, covariance: str) -> int:
        """A block's bases on disk."""
        return sizes.bases_file(self._full_bases(covariance), self._stores_projections(covariance))

    def _compute_bases(self, wildcards: Wildcards) -> Need:
        sizes = self._sizes(wildcards["model"])
        windows = self.study.calibration[wildcards["calibration"]].windows
        full = self._full_bases(wildcards["covariance"])
        layers, stored = sizes.shape.layers, self._bases_file(sizes, wildcards["covariance"])
        reads_gradients = self.study.covariance[wildcards["covariance"]].gradients != "none"
        gradients = sizes.output_moments(SINGLE) if reads_gradients else 0
        return Need(
            gpu=True,
            device={"a decomposition": decomposition(sizes.block), "a block's bases": stored},
            host={
                "program": PROGRAM,
                "a block's weights": sizes.block_weights / layers,
                "a block's covariances": sizes.statistics(windows) + sizes.moments(DOUBLE) + gradients,
                **either(
                    **{
                        "an estimate": 4 * DOUBLE * max(sizes.inputs) ** 2,
                        "bases to be stored": HELD_BY_A_WRITER * stored,
                    }
                ),
            },
            disk=layers * stored,
            work=Work(
                double=sizes.decompositions() * (2 if full else 1),
                disk=sizes.weights + layers * (sizes.statistics_file(windows) + gradients / 2 + 2 * stored),
            ),
        )

    def _eliminate_neurons(self, wildcards: Wildcards) -> Need:
        multiple = None if wildcards["multiple"] == ANY_MULTIPLE else int(wildcards["multiple"])
        windows = self.study.calibration[wildcards["calibration"]].windows
        return elimination_need(self._sizes(wildcards["model"]), multiple, windows)

    def _sliced(
        self,
        model: str,
        covariance: str | None,
        length: int,
        tokens: float,
        operations: float,
        copies: int,
        **host: float,
    ) -> Need:
        """A dense model with its bases, run on some windows again and again.

        Args:
            model: its name.
            covariance: the preset of its bases.
            length: of the windows.
            tokens: of all windows.
            operations: of all passes over them.
            copies: of a chunk's logits, see `Sizes.logits`.
            host: further parts in main memory.
        """
        assert covariance is not None  # whatever runs so names the preset of its bases
        sizes = self._sizes(model)
        batch = batch_tokens(length, LOSS_TOKENS)
        full = self._full_bases(covariance)
        bases, stored = sizes.shape.layers * sizes.bases(sizes.number, full), self._bases_file(sizes, covariance)
        projects = not self._stores_projections(covariance)
        return Need(
            gpu=True,
            device={
                "weights": sizes.weights,
                "bases": bases,
                **either(
                    activations=sizes.activations(batch),
                    logits=sizes.logits(HEAD_TOKENS, copies),
                    **({"a projection": sizes.projecting(full)} if projects else {}),
                ),
            },
            blocks=sizes.shape.layers,
            split={"weights": sizes.block_weights, "bases": bases},
            host={"program": PROGRAM, **host},
            loading=sizes.weights + stored,
            work=in_dtype(
                sizes,
                operations,
                single=sizes.projections(full) if projects else 0,
                disk=sizes.weights + sizes.shape.layers * stored,
            ),
        )

    def _validation_tokens(self, validation: Validation) -> int:
        return (validation.select.keep or validation.windows) * validation.length

    def _select_validation(self, wildcards: Wildcards) -> Need:
        validation = self.study.validation[wildcards["validation"]]
        tokens, choice = validation.windows * validation.length, validation.select
        if not choice.scores:
            return _sampled(tokens)
        model, length = wildcards["model"], validation.length
        operations = choice.allocations * self._sizes(model, choice.ratio).forward(tokens, length)
        return self._sliced(model, choice.covariance, length, tokens, operations, copies=1, texts=TEXTS)

    def _measure_sensitivity(self, wildcards: Wildcards) -> Need:
        settings = self.study.sensitivity[wildcards["sensitivity"]]
        types = FAMILIES[self.study.models[settings.model].shape.family].types
        passes, tokens = len(types) * len(settings.kept) + 1, settings.windows * settings.length
        model, covariance, length = settings.model, settings.covariance, settings.length
        operations = passes * self._sizes(model).forward(tokens, length)
        return self._sliced(model, covariance, length, tokens, operations, copies=1, texts=TEXTS)

    def _measure_truncations(self, wildcards: Wildcards) -> Need:
        figure = self.study.figures[wildcards["figure"]]
        if not isinstance(figure, PredictedLossFigure):
            raise RankwiseError(f"figures.{wildcards['figure']}: it measures nothing")
        passes, tokens = figure.matrices * len(figure.kept) / 2 + 2, figure.windows * figure.length
        sizes, length = self._sizes(figure.model), figure.length
        parts = {"hidden states": 2 * sizes.hidden(tokens), "texts": TEXTS}
        operations = passes * sizes.forward(tokens, length)
        return self._sliced(figure.model, wildcards["covariance"], length, tokens, operations, copies=1, **parts)

    def _search_allocation(self, wildcards: Wildcards) -> Need:
        method = self.study.method(wildcards["method"])
        if method.search is None or method.validation is None:
            raise RankwiseError(f"methods.{wildcards['method']}: it has no search")
        search, validation = self.study.search[method.search], self.study.validation[method.validation]
        tokens, length, dense = self._validation_tokens(validation), validation.length, self._sizes(wildcards["model"])
        trial, reference = self._checkpoint(wildcards).forward(tokens, length), 0.0
        if search.kl_weight:  # the dense model's logits are formed anew beside those of each trial
            reference = dense.hidden(tokens)
            trial += 2 * tokens * dense.head
        return self._sliced(
            wildcards["model"],
            method.covariance,
            length,
            tokens,
            dense.forward(tokens, length, head=False) + search.evaluations * trial,
            copies=4 if search.kl_weight else 1,
            **{"dense hidden states": reference, "libraries": SEARCH_LIBRARIES},
        )

    def _compress_model(self, wildcards: Wildcards) -> Need:
        method, dense = self.study.method(wildcards["method"]), self._sizes(wildcards["model"])
        calibration = self.study.calibration[method.calibration] if method.calibration else None
        bases, projections = 0, 0.0
        if method.covariance:
            bases = self._bases_file(dense, method.covariance)
            if not self._stores_projections(method.covariance):
                projections = dense.projections(self._full_bases(method.covariance))
        return compression_need(method, dense, self._checkpoint(wildcards), calibration, bases, projections)

    def _post_train(self, wildcards: Wildcards) -> Need:
        tuning = self.study.tuning[wildcards["tuning"]]
        if not isinstance(tuning, Tuning):
            raise RankwiseError(f"tuning.{wildcards['tuning']}: it trains on no instructions")
        opened = self._sizes(wildcards["model"], int(wildcards["ratio"]), tuning.dtype)
        return tuning_need(opened, self._checkpoint(wildcards), tuning, zero_of(tuning, SHIPPED))

    def _distil_features(self, wildcards: Wildcards) -> Need:
        tuning = self.study.tuning[wildcards["tuning"]]
        if not isinstance(tuning, FeatureDistillation):
            raise RankwiseError(f"tuning.{wildcards['tuning']}: it distils nothing")
        dense, calibration = self._sizes(wildcards["model"]), self.study.calibration[tuning.calibration]
        return distillation_need(dense, self._checkpoint(wildcards), tuning, calibration)

    def _evaluate(self, wildcards: Wildcards) -> Need:
        suite, longest = self.study.suites[wildcards["suite"]], self.study.models[wildcards["model"]].max_length
        return suite_need(self._checkpoint(wildcards), suite, longest)


def _sampled(tokens: int) -> Need:
    """Windows of so many tokens, drawn from texts by a tokenizer."""
    return Need(host={"program": PROGRAM, "texts": GIB}, disk=4 * tokens, work=Work(seconds=600))
