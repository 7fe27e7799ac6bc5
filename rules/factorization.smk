# Needs calibration windows; makes the per-layer moments of the inputs, and the principal bases of the outputs.


rule collect_statistics:
    input:
        unpack(lambda wildcards: model_files(wildcards.model)),
        tokens=f"{RUN}/calibration/{{model}}/{{calibration}}.safetensors",
    output:
        layers=directory(f"{RUN}/statistics/{{model}}/{{calibration}}/layers"),
        manifest=f"{RUN}/statistics/{{model}}/{{calibration}}/manifest.json",
    log:
        f"{LOGS}/collect_statistics/{{model}}/{{calibration}}.log",
    conda:
        "../envs/rankwise.yaml"
    threads: 8
    resources:
        # Blocks whose accumulators are held at once: memory against passes, never a different result.
        layers_per_pass=8,
    params:
        settings=lambda wildcards: with_code(
            "collect_statistics",
            model_settings(wildcards.model) | {"state": LAYOUT.state},
        ),
    message:
        "collecting statistics of {wildcards.model} on {wildcards.calibration}"
    script:
        "../workflow_scripts/stages/collect_statistics.py"


rule compute_bases:
    input:
        unpack(lambda wildcards: model_files(wildcards.model)),
        layers=ancient(f"{RUN}/statistics/{{model}}/{{calibration}}/layers"),
        manifest=f"{RUN}/statistics/{{model}}/{{calibration}}/manifest.json",
    output:
        layers=directory(f"{RUN}/bases/{{model}}/{{calibration}}/{{covariance}}/layers"),
        manifest=f"{RUN}/bases/{{model}}/{{calibration}}/{{covariance}}/manifest.json",
    log:
        f"{LOGS}/compute_bases/{{model}}/{{calibration}}/{{covariance}}.log",
    conda:
        "../envs/rankwise.yaml"
    threads: 8
    params:
        settings=lambda wildcards: with_code(
            "compute_bases",
            model_settings(wildcards.model) | {"covariance": STUDY.covariance[wildcards.covariance].plain()},
        ),
    message:
        "computing bases of {wildcards.model}: {wildcards.calibration}, {wildcards.covariance}"
    script:
        "../workflow_scripts/stages/compute_bases.py"
