# Needs evaluations and manifests; makes tables, figures, the record of what made them, and the report.


localrules:
    make_table,
    draw_figure,
    write_provenance,
    write_report,


rule make_table:
    input:
        results=lambda wildcards: LAYOUT.table_inputs(wildcards.table),
        published=published_files,
        compared=lambda wildcards: LAYOUT.compared_tables(wildcards.table),
        texts=lambda wildcards: LAYOUT.comparison_of(STUDY.tables[wildcards.table]),
    output:
        csv=f"{RUN}/tables/{{table}}.csv",
        md=f"{RUN}/tables/{{table}}.md",
        tex=f"{RUN}/tables/{{table}}.tex",
        html=report(
            f"{RUN}/tables/{{table}}.html", caption="report/table.rst", category="Tables", labels=labels_of("table")
        ),
    log:
        f"{LOGS}/make_table/{{table}}.log",
    conda:
        "../envs/rankwise.yaml"
    params:
        settings=table_settings,
    message:
        "making {wildcards.table}"
    script:
        "../workflow_scripts/stages/make_table.py"


rule draw_figure:
    input:
        results=lambda wildcards: LAYOUT.figure_inputs(wildcards.figure),
        texts=lambda wildcards: LAYOUT.comparison_of(STUDY.figures[wildcards.figure]),
    output:
        pdf=f"{RUN}/figures/{{figure}}.pdf",
        png=report(
            f"{RUN}/figures/{{figure}}.png",
            caption="report/figure.rst",
            category="Figures",
            labels=labels_of("figure"),
        ),
        csv=f"{RUN}/figures/{{figure}}.csv",
    log:
        f"{LOGS}/draw_figure/{{figure}}.log",
    conda:
        "../envs/rankwise.yaml"
    params:
        settings=figure_settings,
    message:
        "drawing {wildcards.figure}"
    script:
        "../workflow_scripts/stages/draw_figure.py"


rule write_provenance:
    input:
        LAYOUT.evidence(),
    output:
        f"{RUN}/provenance.json",
    log:
        f"{LOGS}/write_provenance.log",
    conda:
        "../envs/rankwise.yaml"
    params:
        settings=provenance_settings,
    message:
        "recording what made the results"
    script:
        "../workflow_scripts/stages/write_provenance.py"


rule write_report:
    input:
        tables=LAYOUT.tables(),
        figures=LAYOUT.figures(),
        provenance=f"{RUN}/provenance.json",
    output:
        report=report(f"{RUN}/report.html", caption="report/page.rst", category="The whole study"),
    log:
        f"{LOGS}/write_report.log",
    conda:
        "../envs/rankwise.yaml"
    params:
        settings=report_settings,
    message:
        "writing the report"
    script:
        "../workflow_scripts/stages/write_report.py"
