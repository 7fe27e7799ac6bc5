# Needs a checkpoint; makes one JSON a suite: perplexity, zero-shot accuracy, cost, generated text. Then checkpoints that are
# not to be kept are given up.


localrules:
    give_up_checkpoint,


rule evaluate_perplexity:
    input:
        unpack(perplexity_files),
    output:
        EVALUATION,
    log:
        f"{LOGS}/evaluate_perplexity/{{model}}/{{method}}/{{ratio}}/{{tuning}}/seed{{seed}}/{{suite}}.log",
    wildcard_constraints:
        suite=one_of(suites_of("perplexity")),
    conda:
        "../envs/rankwise.yaml"
    threads: 4
    resources:
        **asks("evaluate_perplexity"),
    params:
        settings=lambda wildcards: evaluation_settings("evaluate_perplexity", wildcards),
    message:
        "perplexity ({wildcards.suite}) of {wildcards.model}, {wildcards.method}, {wildcards.ratio} %, {wildcards.tuning}"
    script:
        "../workflow_scripts/stages/evaluate_perplexity.py"


rule evaluate_zero_shot:
    input:
        unpack(zero_shot_files),
    output:
        EVALUATION,
    log:
        f"{LOGS}/evaluate_zero_shot/{{model}}/{{method}}/{{ratio}}/{{tuning}}/seed{{seed}}/{{suite}}.log",
    wildcard_constraints:
        suite=one_of(suites_of("zero-shot")),
    conda:
        "../envs/rankwise.yaml"
    threads: 4
    resources:
        **asks("evaluate_zero_shot"),
    params:
        settings=lambda wildcards: evaluation_settings("evaluate_zero_shot", wildcards),
    message:
        "zero-shot tasks ({wildcards.suite}) of {wildcards.model}, {wildcards.method}, {wildcards.ratio} %, {wildcards.tuning}"
    script:
        "../workflow_scripts/stages/evaluate_zero_shot.py"


rule evaluate_cost:
    input:
        unpack(checkpoint_files),
    output:
        EVALUATION,
    log:
        f"{LOGS}/evaluate_cost/{{model}}/{{method}}/{{ratio}}/{{tuning}}/seed{{seed}}/{{suite}}.log",
    wildcard_constraints:
        suite=one_of(suites_of("cost")),
    conda:
        "../envs/rankwise.yaml"
    threads: 8
    resources:
        **asks("evaluate_cost"),
    params:
        settings=lambda wildcards: evaluation_settings("evaluate_cost", wildcards),
    message:
        "cost ({wildcards.suite}) of {wildcards.model}, {wildcards.method}, {wildcards.ratio} %, {wildcards.tuning}"
    script:
        "../workflow_scripts/stages/evaluate_cost.py"


rule evaluate_generation:
    input:
        unpack(checkpoint_files),
    output:
        EVALUATION,
    log:
        f"{LOGS}/evaluate_generation/{{model}}/{{method}}/{{ratio}}/{{tuning}}/seed{{seed}}/{{suite}}.log",
    wildcard_constraints:
        suite=one_of(suites_of("generation")),
    conda:
        "../envs/rankwise.yaml"
    threads: 4
    resources:
        **asks("evaluate_generation"),
    params:
        settings=lambda wildcards: evaluation_settings("evaluate_generation", wildcards),
    message:
        "continuing prompts ({wildcards.suite}) with {wildcards.model}, {wildcards.method}, {wildcards.ratio} %, {wildcards.tuning}"
    script:
        "../workflow_scripts/stages/evaluate_generation.py"


rule give_up_checkpoint:
    input:
        manifest=f"{RUN}/{{place}}/manifest.json",
        results=lambda wildcards: LAYOUT.given_up[f"{RUN}/{wildcards.place}"],
    output:
        f"{RUN}/{{place}}/given_up.json",
    log:
        f"{LOGS}/give_up_checkpoint/{{place}}.log",
    wildcard_constraints:
        place=one_of([folder.removeprefix(f"{RUN}/") for folder in LAYOUT.given_up]),
    conda:
        "../envs/rankwise.yaml"
    params:
        settings=with_code("give_up_checkpoint", {}),
    message:
        "giving up the checkpoint {wildcards.place}"
    script:
        "../workflow_scripts/stages/give_up_checkpoint.py"
