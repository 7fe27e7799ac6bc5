# Needs the network (or paths of this machine); makes the model, texts, instructions and tasks that the rest reads.
# All of it runs on the head node, so that compute nodes may be offline.


localrules:
    fetch_model,
    fetch_corpus,
    fetch_instructions,
    fetch_task,


rule fetch_model:
    output:
        checkpoint=directory(RUN + "/models/{model}"),
        manifest=RUN + "/models/{model}.json",
    params:
        settings=lambda wildcards: with_code(
            "fetch_model",
            {
                "name": wildcards.model,
                "model": STUDY.models[wildcards.model].plain(),
                "cache": STUDY.cache,
            },
        ),
    log:
        LOGS + "/fetch_model/{model}.log",
    conda:
        "../envs/rankwise.yaml"
    message:
        "fetching model {wildcards.model}"
    retries: 2
    script:
        "../workflow_scripts/stages/fetch_model.py"


rule fetch_corpus:
    output:
        index=RUN + "/corpora/{corpus}.json",
        data=RUN + "/corpora/data/{corpus}.jsonl",
    params:
        settings=lambda wildcards: with_code(
            "fetch_corpus",
            {
                "name": wildcards.corpus,
                "corpus": STUDY.corpora[wildcards.corpus].plain(),
                "cache": STUDY.cache,
            },
        ),
    log:
        LOGS + "/fetch_corpus/{corpus}.log",
    conda:
        "../envs/rankwise.yaml"
    message:
        "fetching corpus {wildcards.corpus}"
    retries: 2
    script:
        "../workflow_scripts/stages/fetch_corpus.py"


# The same stage for token ids that are used as they are.
use rule fetch_corpus as fetch_token_corpus with:
    wildcard_constraints:
        corpus=one_of(
            name
            for name, corpus in STUDY.corpora.items()
            if corpus.format == "tokens"
        ),
    output:
        index=RUN + "/corpora/{corpus}.json",
        data=RUN + "/corpora/data/{corpus}.safetensors",


ruleorder: fetch_token_corpus > fetch_corpus


rule fetch_instructions:
    output:
        rows=RUN + "/instructions/{instructions}.jsonl",
    params:
        settings=lambda wildcards: with_code(
            "fetch_instructions",
            {
                "name": wildcards.instructions,
                "instructions": STUDY.instructions[wildcards.instructions].plain(),
                "cache": STUDY.cache,
            },
        ),
    log:
        LOGS + "/fetch_instructions/{instructions}.log",
    conda:
        "../envs/rankwise.yaml"
    message:
        "fetching instructions {wildcards.instructions}"
    retries: 2
    script:
        "../workflow_scripts/stages/fetch_instructions.py"


rule fetch_task:
    output:
        index=RUN + "/tasks/{task}.json",
        rows=directory(RUN + "/tasks/{task}"),
    params:
        settings=lambda wildcards: with_code(
            "fetch_task",
            {
                "name": wildcards.task,
                "task": STUDY.tasks[wildcards.task].plain(),
                "cache": STUDY.cache,
            },
        ),
    log:
        LOGS + "/fetch_task/{task}.log",
    conda:
        "../envs/rankwise.yaml"
    message:
        "fetching task {wildcards.task}"
    retries: 2
    script:
        "../workflow_scripts/stages/fetch_task.py"
