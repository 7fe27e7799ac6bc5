"""Search the allocation of ranks by Bayesian optimisation."""

import shutil
from dataclasses import replace

from snakemake.iocontainers import Snakemake

from lowrank.jobs.stage import run_stage


def work(job: Snakemake) -> None:
    """Search in a resumable folder; the best allocation and all trials are the result."""
    from lowrank.bases.principal import Bases
    from lowrank.config.presets import Search
    from lowrank.config.sources import ModelShape
    from lowrank.files import atomic_path, load_tensors, read_record, write_json
    from lowrank.jobs.state import SECONDS, Clock, resumable_state
    from lowrank.model.runtime import describe_environment
    from lowrank.ranks.budget import Ranks
    from lowrank.search.kept_ratios import SearchSpace
    from lowrank.search.loss_scales import LossScaleSpace, predicted_losses
    from lowrank.search.objective import Objective, Score
    from lowrank.search.search import best_trial, objective_of, search_allocation
    from lowrank.search.sliced_model import open_sliced_model
    from lowrank.search.transfer import transferred_point

    settings = job.params.settings
    method, search = settings["method"], Search.model_validate(settings["search"])
    ratio, seed = settings["subject"]["ratio"], settings["subject"]["seed"]
    inputs = {"windows": job.input.windows, "model": job.input.model_manifest, "bases": job.input.bases_manifest}
    transferred, transfer = None, None
    opened = open_sliced_model(job.input.model, job.input.bases, settings, job.threads)
    budget = replace(opened.budget, identity_block=method["identity_block"])
    described = (budget, ratio, method["groups"], method["uncompressed"], search)
    space: SearchSpace | LossScaleSpace
    if search.variables == "loss-scales":
        bases = Bases(job.input.bases, budget.dimensions.layers)
        space = LossScaleSpace(*described, predicted_losses(bases, budget))
    else:
        space = SearchSpace.of(*described)
    if job.input.get("source"):
        inputs["source"] = job.input.source
        source = read_record(job.input.source)
        assert isinstance(space, SearchSpace)  # the check of the config lets nothing else have a transfer
        transferred = transferred_point(space, source, ModelShape.model_validate(settings["source_shape"]))
        transfer = {"from": source["subject"], "ratios": space.by_type(transferred)}
    windows = load_tensors(job.input.windows, ("tokens",))["tokens"].long()
    objective = Objective.of(opened.sliced, windows, search, opened.device)
    total = sum(parameter.numel() for parameter in opened.sliced.model.parameters())
    with resumable_state(settings["state"], job.rule, settings, inputs) as state:
        clock = Clock(state / SECONDS)

        def evaluate(ranks: Ranks) -> Score:
            score = objective.evaluate(ranks)
            clock.save()
            return score

        trials = search_allocation(space, evaluate, search, seed, state / "trials.csv", transferred)
        best = best_trial(trials)
        ranks = space.ranks(trials[best].x)
        with atomic_path(job.output.trials) as temporary:
            shutil.copyfile(state / "trials.csv", temporary)
        write_json(
            job.output.allocation,
            {
                "kind": "allocation",
                "subject": settings["subject"],
                "variables": space.by_type(trials[best].x),
                "groups": [[layers[0], layers[-1]] for layers in space.groups],
                "ranks": ranks,
                "kept": space.budget.kept(ranks),
                "kept_of_model": 1 - (budget.dense_parameters - budget.parameters(ranks)) / total,
                "objective": trials[best].score.objective,
                "perplexity": trials[best].score.perplexity,
                "kl": trials[best].score.kl,
                "origin": trials[best].origin,
                "uniform_objective": objective_of(trials, "uniform"),
                "lord_objective": objective_of(trials, "lord"),
                "predicted_objective": objective_of(trials, "predicted"),
                "transfer": transfer,
                "best_trial": best,
                "evaluations": len(trials),
                "protocol": {"method": method, "search": settings["search"], "dtype": settings["dtype"]},
                "environment": describe_environment(opened.device),
                "seconds": clock.seconds,
            },
        )


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)
