"""A wish becomes a small config that loads, or a message that says what of it is wrong."""

from __future__ import annotations

import gzip
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig

from lowrank.config.load import load_study
from lowrank.errors import RankwiseError
from lowrank.sources.local import find_files
from lowrank.sources.own import CONFIG, Own, Wish, own_study, write_config
from tests import tiny

LONG = " ".join(tiny.text(seed, 1000) for seed in range(60))
SHORT = LONG[: 20 * 256 * 8]


def model(folder: Path, **changes: Any) -> str:
    """A folder with nothing but the description of a model of a real size."""
    folder.mkdir(parents=True)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 9}
    shape |= {"num_key_value_heads": 3, "max_position_embeddings": 8192, "dtype": "bfloat16"}
    LlamaConfig(**shape | changes).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def wish(tmp_path: Path) -> Wish:
    return Wish(model(tmp_path / "My model, v2"), "20", out=str(tmp_path / "out"))


def granted(wish: Wish) -> Own:
    own = own_study(wish, Path("cache"))
    write_config(own)
    return own


def refused(wish: Wish) -> str:
    with pytest.raises(RankwiseError) as caught:
        granted(wish)
    return str(caught.value)


def test_the_config_is_short_and_loads_as_it_is(wish: Wish) -> None:
    own = granted(wish)
    written = own.config.read_text()
    assert len(written.splitlines()) < 15
    study = load_study(own.config)
    assert study == own.study
    described = study.models["My-model-v2"]
    assert described.source.path == wish.model
    assert (described.dtype, described.max_length) == ("bfloat16", 2048)
    assert study.methods["rankwise"].calibration == "standard"
    assert [row.ratio for row in study.tables["quality"].rows] == [0, 20]
    assert sorted(study.corpora) == ["calibration", "test"]
    assert study.corpora["test"].source.pypi.startswith("llamafactory")
    snakemake = Path(sys.executable).parent / "snakemake"
    assert f"again, after a change too: {snakemake} --configfile {own.config} --directory {own.out}" in written


def test_texts_of_ones_own(wish: Wish, tmp_path: Path) -> None:
    calibration, folder = tmp_path / "calibration.jsonl", tmp_path / "texts"
    calibration.write_text("".join(json.dumps({"text": LONG[i : i + 5000]}) + "\n" for i in range(0, len(LONG), 5000)))
    folder.mkdir()
    (folder / "a.txt").write_text(LONG[: len(LONG) // 2])
    (folder / "b.txt").write_text(LONG[len(LONG) // 2 :])
    (folder / "notes.md").write_text("of no kind that is read")
    for ignored in ("a.txt.bak", "a.txt~", ".c.txt"):
        (folder / ignored).write_text(LONG)
    (folder / "d.txt").mkdir()
    own = granted(replace(wish, calibration=str(calibration), test=str(folder)))
    study = load_study(own.config)
    assert study.corpora["calibration"].format == "jsonl"
    assert study.corpora["test"].source.plain() == {"path": str(folder), "file": "*.txt"}
    assert {path.name for path in find_files(study.corpora["test"].source)} == {"a.txt", "b.txt"}
    assert study.calibration["standard"].windows == 128
    assert study.suites["perplexity"].windows == 32
    assert len(own.config.read_text().splitlines()) < 15


def test_hidden_files_and_backups_do_not_count_as_text(wish: Wish, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("short")
    for ignored in ("a.txt.bak", "a.txt~", ".b.txt"):
        (folder / ignored).write_text(LONG)
    assert f"TEST: {folder} has 5 characters" in refused(replace(wish, test=str(folder)))


def test_packed_texts_are_a_kind_of_their_own(wish: Wish, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt.gz").write_bytes(gzip.compress(LONG.encode()))
    corpus = load_study(granted(replace(wish, test=str(folder))).config).corpora["test"]
    assert (corpus.source.plain(), corpus.format) == ({"path": str(folder), "file": "*.txt.gz"}, "text")
    (folder / "a.txt").write_text(LONG)
    assert "files of several kinds (.txt, .txt.gz)" in refused(replace(wish, test=str(folder)))


def test_searches_validate_on_the_text_that_is_given(wish: Wish, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text(SHORT)
    search = replace(wish, method="bolaco-5x1")
    study = load_study(granted(replace(search, calibration=str(text))).config)
    validation, calibration = study.validation["standard"], study.calibration["standard"]
    assert validation.corpora == ["calibration"]
    assert (validation.windows, validation.length, validation.select.keep) == (20, 256, 16)
    assert validation.seed != calibration.seed, "other windows, as far as the text has others"
    study = load_study(granted(replace(search, out=str(tmp_path / "presets"))).config)
    assert study.validation["standard"].corpora == ["wikipedia-validation"]


def test_short_texts_and_short_models_get_fewer_and_shorter_windows(tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text(SHORT)
    short = model(tmp_path / "m", max_position_embeddings=256)
    (tmp_path / "t.txt").write_text(SHORT)
    own = granted(Wish(short, "20", out=str(tmp_path / "out"), calibration=str(text), test=str(tmp_path / "t.txt")))
    study = load_study(own.config)
    assert study.models["m"].max_length == 256
    assert (study.calibration["standard"].windows, study.calibration["standard"].length) == (20, 256)
    assert (study.suites["perplexity"].windows, study.suites["perplexity"].length) == (20, 256)
    assert len(own.config.read_text().splitlines()) < 15


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "MODEL: missing; name a folder"),
        ({"model": "no/where/at-all"}, "MODEL: there is no /"),
        ({"model": "org/name-1b"}, "hf download org/name-1b --local-dir name-1b`, and give MODEL=name-1b"),
        ({"model": __file__}, "is neither a folder in the Hugging Face layout nor a .gguf file"),
        ({"model": str(Path(__file__).parent)}, "a model is a GGUF file or a folder with one `config.json`"),
        ({"ratio": ""}, "RATIO: missing; give a whole number from 1 to 90, the percentage to remove"),
        ({"ratio": "0.2"}, "RATIO: must be a whole number from 1 to 90, the percentage to remove, not 0.2"),
        ({"ratio": "91"}, "not 91"),
        ({"dtype": "bf16"}, "DTYPE: 'bf16' is not one of float32, bfloat16, float16 - did you mean 'bfloat16'?"),
        ({"calibration": "no/where"}, "CALIBRATION: there is no /"),
        ({"test": "pyproject.toml"}, "is no text file of a known kind (.txt, .jsonl, .json, .parquet)"),
        ({"test": "tests"}, "holds no text file (.txt, .jsonl, .json, .parquet)"),
    ],
)
def test_what_cannot_be_granted(wish: Wish, changes: dict[str, str], message: str) -> None:
    assert message in refused(replace(wish, **changes))
    assert not (Path(wish.out) / CONFIG).exists()


def test_a_model_with_an_adapter_beside_it_is_refused_before_anything_is_fetched(wish: Wish) -> None:
    (Path(wish.model) / "adapter_config.json").write_text("{}")
    assert refused(wish).startswith(f"MODEL: {wish.model}: an adapter (LoRA) lies beside its weights")


def test_texts_that_are_no_use(wish: Wish, tmp_path: Path) -> None:
    text = tmp_path / "x.txt"
    text.write_text("short")
    said = refused(replace(wish, calibration=str(text)))
    assert f"CALIBRATION: {text} has 5 characters, and 16,384 are the least (8 x 256 tokens)" in said
    text.write_bytes(b"\xff" * 9000)
    assert "TEST: " in (said := refused(replace(wish, test=str(text))))
    assert "UTF-8" in said
    (tmp_path / "x.jsonl").write_text('{"words": "a"}\n')
    assert "TEST: " in (said := refused(replace(wish, test=str(tmp_path / "x.jsonl"))))
    assert "words" in said
    assert "files of several kinds (.jsonl, .txt)" in refused(replace(wish, test=str(tmp_path)))
    text.write_text(LONG)


def test_the_same_text_for_both_is_refused_in_the_words_of_the_command(wish: Wish, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(LONG)
    (folder / "b.txt").write_text(LONG)
    (tmp_path / "link.txt").symlink_to(folder / "b.txt")
    for calibration, test in ((folder / "a.txt", folder / "a.txt"), (folder, tmp_path / "link.txt"), (folder, folder)):
        said = refused(replace(wish, calibration=str(calibration), test=str(test)))
        assert said in {
            f"TEST: the same text as CALIBRATION ({file}); give another file"
            for file in (folder / "a.txt", tmp_path / "link.txt")
        }


def test_a_method_that_reads_no_calibration_text_says_that_it_is_not_used(wish: Wish, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(LONG)
    text = str(tmp_path / "a.txt")
    plain = granted(replace(wish, method="svd", calibration=text, test=text))
    assert plain.remarks == ("svd reads no calibration text: CALIBRATION is not used",)
    assert "calibration" not in plain.study.corpora
    assert "CALIBRATION=" not in plain.text
    assert granted(replace(wish, method="svd", test=text, out=str(tmp_path / "b"))).remarks == ()
    assert granted(replace(wish, calibration=text, out=str(tmp_path / "c"))).remarks == ()


def test_only_methods_that_work_are_offered(wish: Wish, tmp_path: Path) -> None:
    said = refused(replace(wish, method="rankwize"))
    assert "METHOD: 'rankwize' is no method - did you mean 'rankwise'?" in said
    offered = said.rpartition("ratio: ")[2].split(", ")
    assert {"rankwise", "svd", "bolaco-5x1", "slicegpt"} <= set(offered)
    assert offered == sorted(offered)
    assert "dense" not in offered
    for name in offered:
        granted(replace(wish, method=name, out=str(tmp_path / name)))
    few = replace(wish, model=model(tmp_path / "few", num_attention_heads=1, num_key_value_heads=1, head_dim=64))
    said = refused(replace(few, method="nothing", ratio="80"))
    left = said.rpartition("ratio: ")[2].split(", ")
    assert set(left) < set(offered)
    (gone, *_) = set(offered) - set(left)
    assert refused(replace(few, method=gone, ratio="80")).startswith("METHOD: the study has ")


def test_a_folder_that_is_in_use(wish: Wish, tmp_path: Path) -> None:
    own = granted(wish)
    written = own.config.read_text()
    assert granted(wish).config.read_text() == written, "the same wish goes on"
    said = refused(replace(wish, ratio="30"))
    assert said.startswith(f"OUT: {own.config} says something else")
    assert f"run it as it is: {Path(sys.executable).parent / 'snakemake'} --configfile {own.config} " in said
    own.config.write_text(written.replace("ratio: 20", "ratio: 25"))
    assert refused(wish).startswith("OUT: ")
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").touch()
    assert "holds other files; choose a folder that is new or empty" in refused(replace(wish, out=str(other)))
    assert "is a file; name a folder" in refused(replace(wish, out=str(other / "file")))


@pytest.mark.parametrize("name", ["a: b", "[x] {", "'q'", "#c", "yes", "é", "\U0001f600", "010", "a, b", "long-" * 40])
def test_any_path_can_be_written(name: str, tmp_path: Path) -> None:
    path = model(tmp_path / name)
    own = granted(Wish(path, "20", out=str(tmp_path / "out")))
    assert [entry["source"]["path"] for entry in yaml.safe_load(own.config.read_text())["models"].values()] == [path]
    load_study(own.config)


@pytest.mark.parametrize(
    ("name", "said"), [("{y}", "Snakemake takes {...} in a name for a wildcard"), ("\udce9", "its name is no UTF-8")]
)
def test_a_path_that_the_workflow_could_not_read_is_refused(name: str, said: str, tmp_path: Path) -> None:
    assert said in refused(Wish(model(tmp_path / name), "20", out=str(tmp_path / "out")))


def test_a_model_that_reads_little_at_once_is_timed_on_what_it_reads(tmp_path: Path) -> None:
    own = granted(Wish(model(tmp_path / "m", max_position_embeddings=128), "20", out=str(tmp_path / "out")))
    cost = load_study(own.config).suites["cost"]
    assert (cost.prompt_tokens, cost.new_tokens) == (112, 16)
