# The settings of stages: for each job one plain dict of all that decides its result, and nothing else. Snakemake compares
# it with the one that the result was made with (as text, hence one dict with names, not many params).

CODE = Code(SCRIPTS, Path(workflow.basedir) / "envs/requirements.txt")


def with_code(stage, settings, *modules, only=None):
    """A stage's settings with the fingerprint of its code, and the pins of the packages that it uses."""
    code = CODE.fingerprint(stage, *modules, only=only)
    packages = CODE.packages(stage, *modules, only=only)
    return dict(sorted((settings | {"code": code, "packages": packages}).items()))


def templates(pattern):
    """Digests of the templates that a stage fills in: they are code too."""
    folder = SCRIPTS / "lowrank/paper/templates"
    return {path.name: sha256_file(path)[:16] for path in sorted(folder.glob(pattern))}


def method_module(method):
    """Module of a preset's method, for the fingerprint of the stage that runs it."""
    return f"lowrank.methods.{STUDY.method(method).kind.replace('-', '_')}"


def untracked_cache(wildcards, output):
    """Where downloads are kept. Snakemake does not compare what a function of `output` gives: moving it reruns nothing."""
    return str(STUDY.cache_folder)


def untracked_max_length(wildcards, output):
    """A model's longest context, to be compared with what it can read. Like the cache, it fetches no model again."""
    return STUDY.models[wildcards.model].max_length


def untracked_base(wildcards, output):
    """What a model card says of the base model: to change a licence in the config compresses nothing again."""
    model = STUDY.models[wildcards.model]
    return {"source": model.source.plain(), "license": model.license}


def fetch_settings(stage, key, name, section):
    """What decides the content of something fetched: not its licence, nor how it is used later, nor a shape that is
    left out: it is read from what was fetched.

    How long a random model's context is decides what is made: its positions, for some families its weights too.
    """
    entry = section[name]
    plain = entry.as_stated() if key == "model" else entry.plain()
    later = ("license",) if isinstance(section[name].source, RandomSource) else ("license", "max_length")
    return with_code(stage, {"name": name, key: {k: v for k, v in plain.items() if k not in later}})


def comparison_settings(wildcards):
    """Which corpora may share nothing."""
    pairs = [{"tested": pair.tested, "seen": pair.seen} for pair in LAYOUT.text_pairs]
    return with_code("compare_texts", {"pairs": pairs, "corpora": LAYOUT.compared_corpora()})


def untracked_places(wildcards, output):
    """The places of the config that say so, for messages: one more suite of the same corpora compares nothing again."""
    return [{"tested_at": list(pair.tested_at), "seen_at": list(pair.seen_at)} for pair in LAYOUT.text_pairs]


def calibration_settings(name):
    """What decides the windows themselves; what is collected on them does not."""
    later = ("gradient_windows", "gradient_draws", "expert_tokens")
    return {key: value for key, value in STUDY.calibration[name].plain().items() if key not in later}


def expert_settings(model, calibration):
    """How few tokens leave an expert dense, of models that have some."""
    least = STUDY.calibration[calibration].expert_tokens
    return {"expert_tokens": least} if STUDY.models[model].shape.experts else {}


def covariance_settings(method):
    """The preset of a method's bases, where it estimates covariances beside them by itself."""
    preset = STUDY.method(method)
    if not preset.covariance or not {"statistics", "gradients"} & set(preset.needs):
        return {"covariance": None}
    return {"covariance": STUDY.covariance[preset.covariance].plain()}


def model_settings(name):
    """What every stage that opens a model needs to know of it."""
    model = STUDY.models[name]
    return {
        "model": name,
        "dtype": model.dtype,
        "shape": model.shape.plain(),
    }


def subject(wildcards):
    """What a result is about."""
    return {
        "model": wildcards.model,
        "method": wildcards.method,
        "ratio": int(wildcards.ratio),
        "tuning": wildcards.get("tuning", "none"),
        "seed": int(wildcards.seed),
    }


def elimination_settings(wildcards):
    """What decides the eliminations of neurons: no ratio, and no method but for the multiple."""
    return with_code(
        "eliminate_neurons",
        model_settings(wildcards.model)
        | {
            "covariance": STUDY.covariance[wildcards.covariance].plain(),
            "multiple": None if wildcards.multiple == ANY_MULTIPLE else int(wildcards.multiple),
            "state": LAYOUT.state,
        },
    )


def validation_settings(wildcards):
    """Where no window is scored, nothing but the tokenizer of the model decides which they are."""
    validation = STUDY.validation[wildcards.validation]
    opened = model_settings(wildcards.model) if validation.select.scores else {"model": wildcards.model}
    return with_code("select_validation", opened | {"validation": validation.plain(), "state": LAYOUT.state})


def search_settings(wildcards):
    method = STUDY.method(wildcards.method)
    source = {"source_shape": STUDY.models[method.transfer.model].shape.plain()} if method.transfer else {}
    return with_code(
        "search_allocation",
        model_settings(wildcards.model)
        | source
        | {
            "method": method.plain(),
            "search": STUDY.search[method.search].plain(),
            "subject": subject(wildcards),
            "state": LAYOUT.state,
        },
    )


def post_training_settings(wildcards):
    tuning = STUDY.tuning[wildcards.tuning]
    return with_code(
        "post_train",
        model_settings(wildcards.model)
        | {
            "tuning": tuning.plain(),
            "deepspeed": read_json(deepspeed_file(tuning, CONFIG)),
            "subject": subject(wildcards),
            "state": LAYOUT.state,
        },
        "lowrank.post_training.worker",  # started as a process of its own, so no import leads to it
    )


def distillation_settings(wildcards):
    return with_code(
        "distil_features",
        model_settings(wildcards.model)
        | {
            "tuning": STUDY.tuning[wildcards.tuning].plain(),
            "subject": subject(wildcards),
            "state": LAYOUT.state,
        },
    )


def evaluation_settings(stage, wildcards):
    """A model's longest context is a setting where texts are cut at it: windows of a perplexity have their own length."""
    cuts = stage in ("evaluate_zero_shot", "evaluate_generation")
    longest = {"max_length": STUDY.models[wildcards.model].max_length} if cuts else {}
    return with_code(
        stage,
        model_settings(wildcards.model)
        | {
            "suite": STUDY.suites[wildcards.suite].plain(),
            "subject": subject(wildcards),
        }
        | longest,
    )


def shapes_of(table):
    """The models whose shapes a table needs."""
    checks = getattr(table, "checks", [])
    named = [row.model for row in table.rows] + [name for check in checks for name in (check.model, check.units_of)]
    return sorted({name for name in named if name})


def table_settings(wildcards):
    table = STUDY.tables[wildcards.table]
    return with_code(
        "make_table",
        {
            "name": wildcards.table,
            "templates": templates("table.*"),
            "table": table.plain(),
            "suites": {name: STUDY.suites[name].plain() for name in table.suites},
            "rows": LAYOUT.table_rows(wildcards.table),
            "shape": {name: STUDY.models[name].shape.plain() for name in shapes_of(table)},
            "compared": LAYOUT.compared_tables(wildcards.table),
            "smoke": STUDY.smoke,
            "published_folder": f"{CONFIG}/published",
        },
        only={"lowrank.paper.tables.BUILDERS": table.kind},
    )


def figure_settings(wildcards):
    figure = STUDY.figures[wildcards.figure]
    methods = {name: STUDY.method(name) for name in figure.methods} if figure.kind == "search" else {}
    judges = {
        name: {"validation": method.validation, "search": STUDY.search[method.search].plain()}
        for name, method in methods.items()
        if method.search
    }
    return with_code(
        "draw_figure",
        {
            "name": wildcards.figure,
            "figure": figure.plain(),
            "results": LAYOUT.figure_results(wildcards.figure),
            "smoke": STUDY.smoke,
        }
        | ({"judges": judges} if judges else {})
        | ({"vocabulary": STUDY.models[figure.model].shape.vocabulary} if figure.kind == "perplexity" else {}),
        only={"stages.draw_figure.KINDS": figure.kind},
    )


def truncation_settings(wildcards):
    """All that a figure of predicted losses says of its measurements; not how it is drawn."""
    plain = STUDY.figures[wildcards.figure].plain()
    study = {key: value for key, value in plain.items() if key not in ("kind", "title")}
    return with_code(
        "measure_truncations",
        model_settings(study["model"]) | {"truncations": study | {"covariance": wildcards.covariance}},
    )


def report_settings(wildcards):
    plain = USED.plain()
    sections = ("calibration", "covariance", "validation", "search", "sensitivity", "methods", "tuning", "suites")
    return with_code(
        "write_report",
        {
            "run": STUDY.run,
            "templates": templates("report.*"),
            "smoke": STUDY.smoke,
            "seeds": list(STUDY.seeds),
            "models": {
                name: {key: model[key] for key in ("source", "license", "shape")}
                for name, model in plain["models"].items()
            },
            "presets": {section: plain[section] for section in sections},
            "tables": {
                name: {"title": STUDY.tables[name].title}
                | {kind: f"{RUN}/tables/{name}.{kind}" for kind in ("html", "csv")}
                for name in in_order(STUDY.tables)
            },
            "figures": {
                name: {"title": STUDY.figures[name].title}
                | {kind: f"{RUN}/figures/{name}.{kind}" for kind in ("png", "pdf", "csv")}
                for name in in_order(STUDY.figures)
            },
            "evidence": LAYOUT.evidence(),
        },
    )


def provenance_settings(wildcards):
    """All that the results were made from; where downloads are kept is no part of it."""
    return with_code(
        "write_provenance",
        {
            "run": STUDY.run,
            "config": {key: value for key, value in USED.plain().items() if key not in ("cache", "keep_checkpoints")},
            "artefacts": LAYOUT.evidence(),
        },
    )
