"""Choose the validation windows whose perplexity depends most on the allocation of ranks, or keep all of them."""

from snakemake.iocontainers import Snakemake

from lowrank.jobs.stage import run_stage


def work(job: Snakemake) -> None:
    """Score the candidate windows under random feasible allocations and keep some; with `all` no model is run.

    Losses of finished allocations are kept in a resumable folder.
    """
    import torch

    from lowrank.calibration.corpora import load_documents
    from lowrank.config.presets import Validation
    from lowrank.files import save_tensors, write_json
    from lowrank.jobs.state import Parts, resumable_state
    from lowrank.model.runtime import describe_environment, limit_threads
    from lowrank.model.tokenizer import load_tokenizer
    from lowrank.search.kept_ratios import SearchSpace
    from lowrank.search.sliced_model import open_sliced_model
    from lowrank.search.validation import candidate_windows, score_windows, select_windows, selection_record

    settings = job.params.settings
    validation = Validation.model_validate(settings["validation"])
    choice = validation.select
    limit_threads(job.threads)
    corpora = [load_documents(corpus) for corpus in job.input.corpora]
    windows = candidate_windows(corpora, load_tokenizer(job.input.model), validation).long()
    perplexities, kept, device = None, list(range(len(windows))), torch.device("cpu")
    inputs = {f"corpus {index}": corpus for index, corpus in enumerate(job.input.corpora)}
    inputs |= {"model": job.input.model_manifest} | ({"bases": job.input.bases_manifest} if choice.scores else {})
    key = settings | {"wildcards": dict(job.wildcards.items())}  # two presets may ask for the same at the same time
    with resumable_state(settings["state"], job.rule, key, inputs) as state:
        if choice.scores:
            opened = open_sliced_model(job.input.model, job.input.bases, settings, job.threads)
            device = opened.device
            space = SearchSpace(opened.budget, choice.ratio, choice.groups, choice.uncompressed, choice.lower)
            perplexities = score_windows(
                opened.sliced, windows, space, choice.allocations, validation.seed, device, Parts(state)
            )
            kept = select_windows(perplexities, choice)
        save_tensors(job.output.tokens, {"tokens": windows[kept].int()})
        write_json(
            job.output.record,
            {
                "validation": settings["validation"],
                "model": job.wildcards.model,
                **selection_record(perplexities, kept),
                "environment": describe_environment(device),
            },
        )


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)
