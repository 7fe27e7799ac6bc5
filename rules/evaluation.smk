# Needs a checkpoint; makes one JSON a suite: perplexity, zero-shot accuracy, cost.


rule evaluate_perplexity:
    wildcard_constraints:
        suite=one_of(suites_of("perplexity")),
    input:
        unpack(perplexity_files),
    output:
        EVALUATION + ".json",
    params:
        settings=lambda wildcards: evaluation_settings("evaluate_perplexity", wildcards),
    log:
        LOGS
        + "/evaluate_perplexity/{model}/{method}/{ratio}/{tuning}/seed{seed}/{suite}.log",
    conda:
        "../envs/rankwise.yaml"
    threads: 4
    message:
        "perplexity ({wildcards.suite}) of {wildcards.model}, {wildcards.method}, {wildcards.ratio} %, {wildcards.tuning}"
    script:
        "../workflow_scripts/stages/evaluate_perplexity.py"


rule evaluate_zero_shot:
    wildcard_constraints:
        suite=one_of(suites_of("zero-shot")),
    input:
        unpack(zero_shot_files),
    output:
        EVALUATION + ".json",
    params:
        settings=lambda wildcards: evaluation_settings("evaluate_zero_shot", wildcards),
    log:
        LOGS
        + "/evaluate_zero_shot/{model}/{method}/{ratio}/{tuning}/seed{seed}/{suite}.log",
    conda:
        "../envs/rankwise.yaml"
    threads: 4
    message:
        "zero-shot tasks ({wildcards.suite}) of {wildcards.model}, {wildcards.method}, {wildcards.ratio} %, {wildcards.tuning}"
    script:
        "../workflow_scripts/stages/evaluate_zero_shot.py"


rule evaluate_cost:
    wildcard_constraints:
        suite=one_of(suites_of("cost")),
    input:
        unpack(checkpoint_files),
    output:
        EVALUATION + ".json",
    params:
        settings=lambda wildcards: evaluation_settings("evaluate_cost", wildcards),
    log:
        LOGS
        + "/evaluate_cost/{model}/{method}/{ratio}/{tuning}/seed{seed}/{suite}.log",
    conda:
        "../envs/rankwise.yaml"
    threads: 8
    message:
        "cost ({wildcards.suite}) of {wildcards.model}, {wildcards.method}, {wildcards.ratio} %, {wildcards.tuning}"
    script:
        "../workflow_scripts/stages/evaluate_cost.py"
