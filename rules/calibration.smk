# Needs a model and texts; makes calibration windows, the validation windows of the search, and what it costs to
# compress types of matrices or single ones.


rule sample_calibration:
    input:
        unpack(calibration_files),
    output:
        tokens=f"{RUN}/calibration/{{model}}/{{calibration}}.safetensors",
    log:
        f"{LOGS}/sample_calibration/{{model}}/{{calibration}}.log",
    conda:
        "../envs/rankwise.yaml"
    resources:
        **asks("sample_calibration"),
    params:
        settings=lambda wildcards: with_code(
            "sample_calibration",
            {
                "calibration": calibration_settings(wildcards.calibration),
                "model": wildcards.model,
            },
        ),
    message:
        "sampling calibration windows {wildcards.calibration} for {wildcards.model}"
    script:
        "../workflow_scripts/stages/sample_calibration.py"


rule select_validation:
    input:
        unpack(validation_files),
    output:
        tokens=f"{RUN}/validation/{{model}}/{{validation}}.safetensors",
        record=f"{RUN}/validation/{{model}}/{{validation}}.json",
    log:
        f"{LOGS}/select_validation/{{model}}/{{validation}}.log",
    conda:
        "../envs/rankwise.yaml"
    threads: lambda wildcards: 8 if STUDY.validation[wildcards.validation].select.scores else 1
    resources:
        **asks("select_validation"),
    params:
        settings=validation_settings,
    message:
        "selecting validation windows {wildcards.validation} for {wildcards.model}"
    script:
        "../workflow_scripts/stages/select_validation.py"


rule measure_sensitivity:
    input:
        unpack(sensitivity_files),
    output:
        f"{RUN}/sensitivity/{{sensitivity}}.json",
    log:
        f"{LOGS}/measure_sensitivity/{{sensitivity}}.log",
    conda:
        "../envs/rankwise.yaml"
    threads: 8
    resources:
        **asks("measure_sensitivity"),
    params:
        settings=lambda wildcards: with_code(
            "measure_sensitivity",
            model_settings(STUDY.sensitivity[wildcards.sensitivity].model)
            | {"sensitivity": STUDY.sensitivity[wildcards.sensitivity].plain()},
        ),
    message:
        "measuring the sensitivity of each type of matrix: {wildcards.sensitivity}"
    script:
        "../workflow_scripts/stages/measure_sensitivity.py"


# For figures of kind predicted-loss, by their name.
rule measure_truncations:
    input:
        unpack(truncation_files),
    output:
        f"{RUN}/truncations/{{figure}}/{{covariance}}.json",
    log:
        f"{LOGS}/measure_truncations/{{figure}}/{{covariance}}.log",
    wildcard_constraints:
        figure=one_of(figures_of("predicted-loss")),
    conda:
        "../envs/rankwise.yaml"
    threads: 8
    resources:
        **asks("measure_truncations"),
    params:
        settings=truncation_settings,
    message:
        "measuring what truncating single matrices costs: {wildcards.figure}, {wildcards.covariance}"
    script:
        "../workflow_scripts/stages/measure_truncations.py"
