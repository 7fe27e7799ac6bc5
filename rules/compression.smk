# Needs a model and what its method reads; makes a checkpoint that `from_pretrained` opens, and its manifest.


rule compress_model:
    input:
        unpack(compression_files),
    output:
        checkpoint=directory(f"{COMPRESSED}/checkpoint"),
        manifest=f"{COMPRESSED}/manifest.json",
    log:
        f"{LOGS}/compress_model/{{model}}/{{method}}/{{ratio}}/seed{{seed}}.log",
    conda:
        "../envs/rankwise.yaml"
    threads: 4
    resources:
        **asks("compress_model"),
    params:
        base=untracked_base,
        settings=lambda wildcards: with_code(
            "compress_model",
            model_settings(wildcards.model)
            | {
                "method": STUDY.method(wildcards.method).plain(),
                "subject": subject(wildcards),
                "state": LAYOUT.state,
            }
            | covariance_settings(wildcards.method),
            method_module(wildcards.method),
        ),
    message:
        "compressing {wildcards.model} by {wildcards.method}, {wildcards.ratio} %, seed {wildcards.seed}"
    script:
        "../workflow_scripts/stages/compress_model.py"
