"""Search the allocation of ranks by Bayesian optimisation."""

import shutil

from snakemake.iocontainers import Snakemake

from lowrank.stage import run_stage


def work(job: Snakemake) -> None:
    """Search in a resumable folder; the best allocation and all trials are the result."""
    from lowrank.budget import Ranks
    from lowrank.config.presets import Search
    from lowrank.files import atomic_path, load_tensors, write_json
    from lowrank.objective import Objective, Score
    from lowrank.runtime import describe_environment
    from lowrank.search import best_trial, search_allocation
    from lowrank.search_space import SearchSpace
    from lowrank.sliced import open_sliced_model
    from lowrank.state import Clock, resumable_state

    settings = job.params.settings
    method, search = settings["method"], Search.model_validate(settings["search"])
    ratio, seed = settings["subject"]["ratio"], settings["subject"]["seed"]
    inputs = {"windows": job.input.windows, "model": job.input.model_manifest, "bases": job.input.bases_manifest}
    opened = open_sliced_model(job.input.model, job.input.bases, settings, job.threads)
    space = SearchSpace(opened.budget, ratio, method["groups"], method["uncompressed"], search.lower)
    windows = load_tensors(job.input.windows)["tokens"].long()
    objective = Objective(opened.sliced, windows, search.kl_weight, opened.device)
    with resumable_state(settings["state"], job.rule, settings, inputs) as state:
        clock = Clock(state / "seconds.json")

        def evaluate(ranks: Ranks) -> Score:
            score = objective.evaluate(ranks)
            clock.save()
            return score

        trials = search_allocation(space, evaluate, search, seed, state / "trials.csv")
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
                "objective": trials[best].score.objective,
                "perplexity": trials[best].score.perplexity,
                "kl": trials[best].score.kl,
                "uniform_objective": trials[0].score.objective,
                "best_trial": best,
                "evaluations": len(trials),
                "protocol": {"method": method, "search": settings["search"], "dtype": settings["dtype"]},
                "environment": describe_environment(opened.device),
                "seconds": clock.seconds,
            },
        )


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)
