# rankwise: low-rank compression of language models, from calibration text to the tables of a paper.
#
#   snakemake --configfile config/quickstart.yaml --profile profiles/local     the quickstart, on a laptop
#   snakemake --profile slurm all                                              a study, on a cluster
#   snakemake data                                                             only what must be downloaded
#   snakemake checkpoints                                                      those given up that a new suite needs again

from dataclasses import asdict

from snakemake.utils import min_version

min_version("9.25")

if not workflow.config_settings.configfiles:

    configfile: f"{workflow.basedir}/config/quickstart.yaml"


include: "rules/common.smk"
include: "rules/settings.smk"
include: "rules/inputs.smk"
include: "rules/data.smk"
include: "rules/calibration.smk"
include: "rules/factorization.smk"
include: "rules/search.smk"
include: "rules/compression.smk"
include: "rules/post_training.smk"
include: "rules/evaluation.smk"
include: "rules/paper.smk"


checked(
    check_rules,
    {rule: as_written(values) for rule, values in workflow.resource_settings._parsed_overwrite_resources.items()},
    [rule.name for rule in workflow.rules],
)


onstart:
    if not workflow.touch and not only_fetches():  # fetches run here, and write what no waiting job does
        checked(refuse_beside_another_start, LAYOUT.frozen_config)
        checked(refuse_while_jobs_run, RUN)
        note_orphans()
        checked(freeze, config, CONFIG_FILES, asdict(Holder.here(HEAD)), LAYOUT.frozen_config)
    checked(write_json, LAYOUT.used_config, USED.plain())
    if not workflow.non_local_exec:
        serve_forks()


localrules:
    all,
    data,
    checkpoints,


rule all:
    default_target: True
    input:
        LAYOUT.tables(),
        LAYOUT.figures(),
        f"{RUN}/report.html",
        [f"{folder}/given_up.json" for folder in LAYOUT.given_up],


rule data:
    input:
        LAYOUT.fetched(),


rule checkpoints:
    input:
        LAYOUT.missing_checkpoints(),
