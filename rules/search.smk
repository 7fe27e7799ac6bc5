# Needs bases and validation windows; makes an allocation of ranks and the log of all its trials.


rule search_allocation:
    input:
        unpack(search_files),
    output:
        allocation=f"{RUN}/allocation/{{model}}/{{method}}/{{ratio}}/seed{{seed}}/allocation.json",
        trials=f"{RUN}/allocation/{{model}}/{{method}}/{{ratio}}/seed{{seed}}/trials.csv",
    log:
        f"{LOGS}/search_allocation/{{model}}/{{method}}/{{ratio}}/seed{{seed}}.log",
    wildcard_constraints:
        method=one_of(searching_methods()),
    conda:
        "../envs/rankwise.yaml"
    threads: 8
    resources:
        **asks("search_allocation"),
    params:
        settings=search_settings,
    message:
        "searching ranks: {wildcards.model}, {wildcards.method}, {wildcards.ratio} %, seed {wildcards.seed}"
    script:
        "../workflow_scripts/stages/search_allocation.py"
