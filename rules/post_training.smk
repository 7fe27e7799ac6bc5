# Needs a compressed checkpoint; makes a checkpoint with what was trained merged into its factors: on instructions, or on the
# dense model's hidden states.


rule post_train:
    input:
        checkpoint=ancient(f"{COMPRESSED}/checkpoint"),
        manifest=f"{COMPRESSED}/manifest.json",
        instructions=lambda wildcards: (f"{RUN}/instructions/{STUDY.tuning[wildcards.tuning].instructions}.jsonl"),
    output:
        checkpoint=directory(f"{TUNED}/checkpoint"),
        manifest=f"{TUNED}/manifest.json",
    log:
        f"{LOGS}/post_train/{{model}}/{{method}}/{{ratio}}/{{tuning}}/seed{{seed}}.log",
    wildcard_constraints:
        tuning=one_of(tunings(distilling=False)),
    conda:
        "../envs/rankwise.yaml"
    threads: 8
    resources:
        **asks("post_train"),
    params:
        settings=post_training_settings,
    message:
        "post-training {wildcards.model}, {wildcards.method}, {wildcards.ratio} %: {wildcards.tuning}, seed {wildcards.seed}"
    script:
        "../workflow_scripts/stages/post_train.py"


rule distil_features:
    input:
        unpack(distillation_files),
    output:
        checkpoint=directory(f"{TUNED}/checkpoint"),
        manifest=f"{TUNED}/manifest.json",
    log:
        f"{LOGS}/distil_features/{{model}}/{{method}}/{{ratio}}/{{tuning}}/seed{{seed}}.log",
    wildcard_constraints:
        tuning=one_of(tunings(distilling=True)),
    conda:
        "../envs/rankwise.yaml"
    threads: 8
    resources:
        **asks("distil_features"),
    params:
        settings=distillation_settings,
    message:
        "distilling {wildcards.model}, {wildcards.method}, {wildcards.ratio} %: {wildcards.tuning}, seed {wildcards.seed}"
    script:
        "../workflow_scripts/stages/distil_features.py"
