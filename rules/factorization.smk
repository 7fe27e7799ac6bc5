# Needs calibration windows; makes the per-layer moments of inputs and of loss gradients, the bases of the outputs, and
# what removing neurons costs.


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
        **asks("collect_statistics"),
        # Blocks whose accumulators are held at once: memory against passes, never a different result.
        layers_per_pass=lambda wildcards: ESTIMATOR.layers_per_pass("collect_statistics", wildcards.model),
    params:
        settings=lambda wildcards: with_code(
            "collect_statistics",
            model_settings(wildcards.model)
            | expert_settings(wildcards.model, wildcards.calibration)
            | {"state": LAYOUT.state},
        ),
    message:
        "collecting statistics of {wildcards.model} on {wildcards.calibration}"
    script:
        "../workflow_scripts/stages/collect_statistics.py"


# Only for presets of `covariance` that name `gradients`.
rule collect_gradients:
    input:
        unpack(lambda wildcards: model_files(wildcards.model)),
        tokens=f"{RUN}/calibration/{{model}}/{{calibration}}.safetensors",
    output:
        layers=directory(f"{RUN}/gradients/{{model}}/{{calibration}}/layers"),
        manifest=f"{RUN}/gradients/{{model}}/{{calibration}}/manifest.json",
    log:
        f"{LOGS}/collect_gradients/{{model}}/{{calibration}}.log",
    conda:
        "../envs/rankwise.yaml"
    threads: 8
    resources:
        **asks("collect_gradients"),
        layers_per_pass=lambda wildcards: ESTIMATOR.layers_per_pass("collect_gradients", wildcards.model),
    params:
        settings=lambda wildcards: with_code(
            "collect_gradients",
            model_settings(wildcards.model)
            | {
                "state": LAYOUT.state,
                "windows": STUDY.calibration[wildcards.calibration].gradient_windows,
                "draws": STUDY.calibration[wildcards.calibration].gradient_draws,
            },
        ),
    message:
        "collecting loss gradients of {wildcards.model} on {wildcards.calibration}"
    script:
        "../workflow_scripts/stages/collect_gradients.py"


rule compute_bases:
    input:
        unpack(lambda wildcards: model_files(wildcards.model)),
        unpack(basis_files),
    output:
        layers=directory(f"{RUN}/bases/{{model}}/{{calibration}}/{{covariance}}/layers"),
        manifest=f"{RUN}/bases/{{model}}/{{calibration}}/{{covariance}}/manifest.json",
    log:
        f"{LOGS}/compute_bases/{{model}}/{{calibration}}/{{covariance}}.log",
    conda:
        "../envs/rankwise.yaml"
    threads: 8
    resources:
        **asks("compute_bases"),
    params:
        settings=lambda wildcards: with_code(
            "compute_bases",
            model_settings(wildcards.model) | {"covariance": STUDY.covariance[wildcards.covariance].plain()},
        ),
    message:
        "computing bases of {wildcards.model}: {wildcards.calibration}, {wildcards.covariance}"
    script:
        "../workflow_scripts/stages/compute_bases.py"


# Only for methods that remove neurons by predicted losses; the same for all ratios.
rule eliminate_neurons:
    input:
        unpack(elimination_files),
    output:
        layers=directory(f"{RUN}/neurons/{{model}}/{{calibration}}/{{covariance}}/{{multiple}}/layers"),
        manifest=f"{RUN}/neurons/{{model}}/{{calibration}}/{{covariance}}/{{multiple}}/manifest.json",
    log:
        f"{LOGS}/eliminate_neurons/{{model}}/{{calibration}}/{{covariance}}/{{multiple}}.log",
    conda:
        "../envs/rankwise.yaml"
    threads: 8
    resources:
        **asks("eliminate_neurons"),
    params:
        settings=elimination_settings,
    message:
        "eliminating neurons of {wildcards.model}: {wildcards.calibration}, {wildcards.covariance}, {wildcards.multiple}"
    script:
        "../workflow_scripts/stages/eliminate_neurons.py"
