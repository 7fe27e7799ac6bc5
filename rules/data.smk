# Needs the network (or paths of this machine); makes the model, texts, instructions and tasks that the rest reads, and
# compares the texts.
# All of it runs on the head node, so that compute nodes may be offline. The clients retry a bad connection themselves;
# rules do not retry, whatever the profile says, since a wrong hash or name stays wrong.


localrules:
    compare_texts,
    fetch_model,
    fetch_corpus,
    fetch_token_corpus,
    fetch_instructions,
    fetch_task,


rule fetch_model:
    input:
        unpack(lambda wildcards: model_sources(wildcards.model)),
    output:
        checkpoint=directory(f"{RUN}/models/{{model}}"),
        manifest=f"{RUN}/models/{{model}}.json",
    log:
        f"{LOGS}/fetch_model/{{model}}.log",
    retries: 0
    conda:
        "../envs/rankwise.yaml"
    params:
        cache=untracked_cache,
        max_length=untracked_max_length,
        settings=lambda wildcards: fetch_settings("fetch_model", "model", wildcards.model, STUDY.models),
    message:
        "fetching model {wildcards.model}"
    script:
        "../workflow_scripts/stages/fetch_model.py"


rule fetch_corpus:
    input:
        lambda wildcards: local_files(STUDY.corpora[wildcards.corpus].source),
    output:
        index=f"{RUN}/corpora/{{corpus}}.json",
        data=f"{RUN}/corpora/data/{{corpus}}.jsonl",
    log:
        f"{LOGS}/fetch_corpus/{{corpus}}.log",
    retries: 0
    conda:
        "../envs/rankwise.yaml"
    params:
        cache=untracked_cache,
        settings=lambda wildcards: fetch_settings("fetch_corpus", "corpus", wildcards.corpus, STUDY.corpora),
    message:
        "fetching corpus {wildcards.corpus}"
    script:
        "../workflow_scripts/stages/fetch_corpus.py"


# The same stage for token ids that are used as they are.
use rule fetch_corpus as fetch_token_corpus with:
    output:
        index=f"{RUN}/corpora/{{corpus}}.json",
        data=f"{RUN}/corpora/data/{{corpus}}.safetensors",
    wildcard_constraints:
        corpus=one_of(name for name, corpus in STUDY.corpora.items() if corpus.format == "tokens"),


ruleorder: fetch_token_corpus > fetch_corpus


rule fetch_instructions:
    input:
        lambda wildcards: local_files(STUDY.instructions[wildcards.instructions].source),
    output:
        rows=f"{RUN}/instructions/{{instructions}}.jsonl",
    log:
        f"{LOGS}/fetch_instructions/{{instructions}}.log",
    retries: 0
    conda:
        "../envs/rankwise.yaml"
    params:
        cache=untracked_cache,
        settings=lambda wildcards: fetch_settings(
            "fetch_instructions", "instructions", wildcards.instructions, STUDY.instructions
        ),
    message:
        "fetching instructions {wildcards.instructions}"
    script:
        "../workflow_scripts/stages/fetch_instructions.py"


rule fetch_task:
    input:
        lambda wildcards: local_files(STUDY.tasks[wildcards.task].source),
    output:
        index=f"{RUN}/tasks/{{task}}.json",
        rows=directory(f"{RUN}/tasks/{{task}}"),
    log:
        f"{LOGS}/fetch_task/{{task}}.log",
    retries: 0
    conda:
        "../envs/rankwise.yaml"
    params:
        cache=untracked_cache,
        settings=lambda wildcards: fetch_settings("fetch_task", "task", wildcards.task, STUDY.tasks),
    message:
        "fetching task {wildcards.task}"
    script:
        "../workflow_scripts/stages/fetch_task.py"


# Soon after the fetch, so that text that was seen is met before anything is computed on it.
rule compare_texts:
    input:
        unpack(lambda wildcards: corpora_files(LAYOUT.compared_corpora())),
    output:
        LAYOUT.compared_texts,
    log:
        f"{LOGS}/compare_texts.log",
    priority: 100
    retries: 0
    conda:
        "../envs/rankwise.yaml"
    params:
        places=untracked_places,
        settings=comparison_settings,
    message:
        "comparing tested texts with those of calibration and validation"
    script:
        "../workflow_scripts/stages/compare_texts.py"
