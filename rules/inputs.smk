# The inputs of rules. Big folders and texts never trigger anything (`ancient`), the small manifests beside them do, which
# hold their checksums.


def local_files(source):
    """The files of a source on this machine, so that a changed file is fetched again; a missing one is the stage's error."""
    place = getattr(source, "path", None) or getattr(source, "tokens", None)
    path = Path(place).expanduser() if place else None
    if path is None or not path.exists():
        return []
    if path.is_file():
        return [str(path)]
    return [str(file) for file in matching_files(path, getattr(source, "file", None))]


def model_sources(name):
    """What a model is fetched from on this machine: files of a `path:`, or the model that lends its tokenizer."""
    source = STUDY.models[name].source
    lender = getattr(source, "tokenizer", None)
    if lender:
        return {"tokenizer": ancient(f"{RUN}/models/{lender}"), "tokenizer_manifest": f"{RUN}/models/{lender}.json"}
    return {"files": [file for file in local_files(source) if getattr(source, "file", None) or is_of_a_model(file)]}


def corpus_files(corpus):
    return {"corpus": f"{RUN}/corpora/{corpus}.json", "corpus_data": ancient(LAYOUT.corpus_data(corpus))}


def corpora_files(corpora):
    return {
        "corpora": [f"{RUN}/corpora/{name}.json" for name in corpora],
        "corpus_data": [ancient(LAYOUT.corpus_data(name)) for name in corpora],
    }


def model_files(model):
    return {"model": ancient(f"{RUN}/models/{model}"), "model_manifest": f"{RUN}/models/{model}.json"}


def collected_files(what, model, calibration):
    """Statistics or gradients of a calibration."""
    folder = f"{RUN}/{what}/{model}/{calibration}"
    return {what: ancient(f"{folder}/layers"), f"{what}_manifest": f"{folder}/manifest.json"}


def basis_files(wildcards):
    """Statistics and, where the preset uses them, gradients."""
    statistics = f"{RUN}/statistics/{wildcards.model}/{wildcards.calibration}"
    files = {"layers": ancient(f"{statistics}/layers"), "manifest": f"{statistics}/manifest.json"}
    if STUDY.covariance[wildcards.covariance].gradients != "none":
        gradients = f"{RUN}/gradients/{wildcards.model}/{wildcards.calibration}"
        files |= {"gradients": ancient(f"{gradients}/layers"), "gradients_manifest": f"{gradients}/manifest.json"}
    return files


def bases_files(model, calibration, covariance):
    folder = LAYOUT.bases(model, calibration, covariance)
    return {"bases": ancient(f"{folder}/layers"), "bases_manifest": f"{folder}/manifest.json"}


def neurons_files(model, calibration, covariance, multiple):
    folder = LAYOUT.neurons(model, calibration, covariance, multiple)
    return {"neurons": ancient(f"{folder}/layers"), "neurons_manifest": f"{folder}/manifest.json"}


def elimination_files(wildcards):
    """Statistics and gradients; for pairs of what is left also the elimination without, which is the same."""
    files = model_files(wildcards.model)
    for what in ("statistics", "gradients"):
        files |= collected_files(what, wildcards.model, wildcards.calibration)
    if wildcards.multiple != ANY_MULTIPLE:
        files |= neurons_files(wildcards.model, wildcards.calibration, wildcards.covariance, ANY_MULTIPLE)
    return files


def calibration_files(wildcards):
    return model_files(wildcards.model) | corpora_files(STUDY.calibration[wildcards.calibration].corpora)


def validation_files(wildcards):
    """Bases only where windows are scored."""
    validation = STUDY.validation[wildcards.validation]
    choice = validation.select
    files = model_files(wildcards.model) | corpora_files(validation.corpora)
    return files | (bases_files(wildcards.model, choice.calibration, choice.covariance) if choice.scores else {})


def sensitivity_files(wildcards):
    study = STUDY.sensitivity[wildcards.sensitivity]
    return (
        model_files(study.model)
        | corpus_files(study.corpus)
        | bases_files(study.model, study.calibration, study.covariance)
    )


def searching_methods():
    """Presets whose ranks are searched."""
    return [name for name in STUDY.methods if STUDY.method(name).search]


def truncation_files(wildcards):
    figure = STUDY.figures[wildcards.figure]
    return (
        model_files(figure.model)
        | corpus_files(figure.corpus)
        | bases_files(figure.model, figure.calibration, wildcards.covariance)
    )


def search_files(wildcards):
    """Bases, validation windows and, for a transfer, the allocation that was found for another model."""
    method = STUDY.method(wildcards.method)
    source = LAYOUT.transferred(wildcards.method, wildcards.ratio, wildcards.seed)
    return (
        model_files(wildcards.model)
        | bases_files(wildcards.model, method.calibration, method.covariance)
        | {"windows": f"{RUN}/validation/{wildcards.model}/{method.validation}.safetensors"}
        | ({"source": source} if source else {})
    )


def compression_files(wildcards):
    """A preset with a covariance reads bases, one with a search an allocation; a method may read its calibration too,
    and what removing neurons costs."""
    method = STUDY.method(wildcards.method)
    files = model_files(wildcards.model)
    for what in ("statistics", "gradients"):
        if what in method.needs:
            files |= collected_files(what, wildcards.model, method.calibration)
    if "tokens" in method.needs:
        files["tokens"] = f"{RUN}/calibration/{wildcards.model}/{method.calibration}.safetensors"
    if method.covariance:
        files |= bases_files(wildcards.model, method.calibration, method.covariance)
    if method.eliminates:
        files |= neurons_files(wildcards.model, method.calibration, method.covariance, method.eliminates)
    if method.search:
        files["allocation"] = LAYOUT.allocation(**wildcards)
    return files


def checkpoint_files(wildcards):
    """The checkpoint that a row of a table is about."""
    folder = LAYOUT.checkpoint(wildcards.tuning).format(**wildcards)
    return {"checkpoint": ancient(f"{folder}/checkpoint"), "manifest": f"{folder}/manifest.json"}


def distillation_files(wildcards):
    """A compressed checkpoint, its dense model, and the windows of a calibration."""
    folder = COMPRESSED.format(**wildcards)
    return model_files(wildcards.model) | {
        "checkpoint": ancient(f"{folder}/checkpoint"),
        "manifest": f"{folder}/manifest.json",
        "tokens": f"{RUN}/calibration/{wildcards.model}/{STUDY.tuning[wildcards.tuning].calibration}.safetensors",
    }


def perplexity_files(wildcards):
    corpora = STUDY.suites[wildcards.suite].corpora
    return checkpoint_files(wildcards) | {
        "corpora": [f"{RUN}/corpora/{name}.json" for name in corpora],
        "data": [ancient(LAYOUT.corpus_data(name)) for name in corpora],
    }


def zero_shot_files(wildcards):
    tasks = STUDY.suites[wildcards.suite].tasks
    return checkpoint_files(wildcards) | {
        "tasks": [f"{RUN}/tasks/{name}.json" for name in tasks],
        "rows": [ancient(f"{RUN}/tasks/{name}") for name in tasks],
    }


def published_files(wildcards):
    """The published values that a table shows beside ours."""
    references = published_references(STUDY.tables[wildcards.table])
    return sorted({f"{CONFIG}/published/{reference.file}.csv" for _, reference in references})
