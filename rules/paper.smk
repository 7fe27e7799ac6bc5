# Needs evaluations and manifests; makes tables, figures, the record of what made them, and the report.


localrules:
    make_table,
    draw_figure,
    write_provenance,
    write_report,


rule make_table:
    input:
        results=table_inputs,
        published=published_files,
    output:
        csv=RUN + "/tables/{table}.csv",
        md=RUN + "/tables/{table}.md",
        tex=RUN + "/tables/{table}.tex",
        html=RUN + "/tables/{table}.html",
    params:
        settings=table_settings,
    log:
        LOGS + "/make_table/{table}.log",
    conda:
        "../envs/rankwise.yaml"
    message:
        "making {wildcards.table}"
    script:
        "../workflow_scripts/stages/make_table.py"


rule draw_figure:
    input:
        results=figure_inputs,
    output:
        pdf=RUN + "/figures/{figure}.pdf",
        png=RUN + "/figures/{figure}.png",
        csv=RUN + "/figures/{figure}.csv",
    params:
        settings=figure_settings,
    log:
        LOGS + "/draw_figure/{figure}.log",
    conda:
        "../envs/rankwise.yaml"
    message:
        "drawing {wildcards.figure}"
    script:
        "../workflow_scripts/stages/draw_figure.py"


rule write_provenance:
    input:
        evidence_files(),
    output:
        RUN + "/provenance.json",
    params:
        settings=lambda wildcards: with_code(
            "write_provenance",
            {
                "run": STUDY.run,
                "config": STUDY.plain(),
                "artefacts": evidence_files(),
            },
        ),
    log:
        LOGS + "/write_provenance.log",
    conda:
        "../envs/rankwise.yaml"
    message:
        "recording what made the results"
    script:
        "../workflow_scripts/stages/write_provenance.py"


rule write_report:
    input:
        tables=table_files(),
        figures=figure_files(),
        provenance=RUN + "/provenance.json",
    output:
        report=RUN + "/report.html",
    params:
        settings=report_settings,
    log:
        LOGS + "/write_report.log",
    conda:
        "../envs/rankwise.yaml"
    message:
        "writing the report"
    script:
        "../workflow_scripts/stages/write_report.py"
