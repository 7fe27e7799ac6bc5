# Needs a compressed checkpoint and instructions; makes a checkpoint with the trained scales merged into its factors.


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
        tuning=one_of(STUDY.tuning),
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
