# Needs bases and validation windows; makes an allocation of ranks and the log of all its trials.


rule search_allocation:
    wildcard_constraints:
        method=one_of(searching_methods()),
    input:
        unpack(search_files),
    output:
        allocation=RUN + "/allocation/{model}/{method}/{ratio}/seed{seed}/allocation.json",
        trials=RUN + "/allocation/{model}/{method}/{ratio}/seed{seed}/trials.csv",
    params:
        settings=lambda wildcards: with_code(
            "search_allocation",
            model_settings(wildcards.model)
            | {
                "method": STUDY.method(wildcards.method).plain(),
                "search": STUDY.search[STUDY.method(wildcards.method).search].plain(),
                "state": STATE,
            },
        ),
    log:
        LOGS + "/search_allocation/{model}/{method}/{ratio}/seed{seed}.log",
    conda:
        "../envs/rankwise.yaml"
    threads: 8
    message:
        "searching ranks: {wildcards.model}, {wildcards.method}, {wildcards.ratio} %, seed {wildcards.seed}"
    script:
        "../workflow_scripts/stages/search_allocation.py"
