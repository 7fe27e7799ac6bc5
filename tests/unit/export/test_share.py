"""`make export` as a command: what comes out, what its card says, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank.config.sources import ModelShape
from lowrank.export.numbers import measured
from lowrank.export.wish import Export
from lowrank.files import sha256_file, write_json
from lowrank.methods import method_modules
from lowrank.model.card import base_of, model_card
from lowrank.model.checkpoint import load_checkpoint, save_checkpoint
from lowrank.model.parameters import count_parameters
from tests import tiny
from tests.unit.export.export_samples import IDS, MAKES, Graph

sys.path.insert(0, str(Path(__file__).parents[3] / "workflow_scripts"))
import export as command

KIND = "llama-gqa"
SUBJECT = {"model": "tiny", "method": "m", "ratio": 20, "tuning": "none", "seed": 0}
HUB = {"hub": "owner/name", "revision": "a" * 40}


def described(make: str, licence: str | None = "Apache-2.0", source: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the manifest of a tiny checkpoint says."""
    counts = count_parameters(MAKES[make](KIND), ModelShape(**tiny.shape(KIND)))
    kept = {"linears": counts["decoder_linears"] / counts["decoder_linears_dense"]}
    kept["total"] = counts["total"] / counts["total_dense"]
    base = base_of("tiny", source or HUB, licence, 4 * counts["total_dense"])
    return {"subject": SUBJECT, "base": base, "method": {"kind": "svd"}, "parameters": counts, "kept": kept}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint in the results of a study, with two evaluations."""
    made_from = tmp_path / "tokenizer"
    tiny.tokenizer().save_pretrained(made_from)
    (made_from / "LICENSE").write_text("terms")
    (made_from / "generation_config.json").write_text("{}")
    folder = tmp_path / "results/run/compressed/tiny/m/20/seed0/checkpoint"
    manifest = described("own widths")
    files = save_checkpoint(MAKES["own widths"](KIND), made_from, folder, lambda at: model_card(manifest, at))
    write_json(folder.with_name("manifest.json"), manifest | {"files": files})
    evaluations = tmp_path / "results/run/evaluation/tiny/m/20/none/seed0"
    found = {"perplexity": 31.256, "stderr": 0.514, "windows": 6}
    protocol = {"length": 256, "dtype": "float32", "harness": "lm-eval 1.2"}
    text = {"kind": "perplexity", "subject": SUBJECT, "protocol": protocol, "corpora": {"c4-test": found}}
    write_json(evaluations / "held-out.json", text)
    task = {"metric": "acc", "acc": 0.625, "acc_stderr": 0.021, "documents": 500}
    tasks = {"kind": "zero-shot", "subject": SUBJECT, "protocol": protocol, "tasks": {"piqa": task}, "smoke": True}
    write_json(evaluations / "zero-shot.json", tasks)
    return folder


def heavy_imports(*given: str) -> set[str]:
    """What the command has imported when it refuses a wish."""
    script = f"import sys, export; assert export.main({list(given)!r}) == 1; print(*sys.modules)"
    folder = Path(command.__file__).parent
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    return set(done.stdout.split()) & {"torch", "transformers"}


def run(checkpoint: Path | str, to: str, out: Path | str) -> int:
    return command.main([f"--to={to}", "--", str(checkpoint), str(out)])


def test_dense_opens_without_trust_and_its_card_has_sizes_and_numbers(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "dense"
    assert run(checkpoint, "dense", out) == 0
    said = capsys.readouterr().out
    stock, model = AutoModelForCausalLM.from_pretrained(out), load_checkpoint(checkpoint, torch.float32)
    assert torch.allclose(stock(IDS).logits, model(IDS).logits, atol=1e-5)
    assert f"LlamaForCausalLM, {stock.num_parameters():,} parameters" in said
    assert AutoTokenizer.from_pretrained(out)("a river").input_ids
    names = {path.name for path in out.iterdir()}
    assert {"README.md", "LICENSE", "generation_config.json", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith(".py")]
    card = (out / "README.md").read_text()
    assert "trust_remote_code" not in card
    assert (
        f"{stock.num_parameters():,} parameters where the compressed checkpoint has {model.num_parameters():,}" in card
    )
    assert "| perplexity, c4-test | 31.26 ± 0.51 | 6 windows of 256 tokens, float32 |" in card
    assert "| piqa, % | 62.5 ± 2.1 | lm-eval 1.2, acc, 500 documents, float32, a smoke run |" in card


def test_numbers_are_found_whatever_a_model_is_called(checkpoint: Path, tmp_path: Path) -> None:
    results = tmp_path / "results/run"
    for kind in ("compressed", "evaluation"):
        (results / kind / "tiny").rename(results / kind / "tuned")
    manifest = results / "compressed/tuned/m/20/seed0/manifest.json"
    write_json(manifest, json.loads(manifest.read_text()) | {"subject": SUBJECT | {"model": "tuned"}})
    assert "| perplexity, c4-test | 31.26" in measured(manifest.with_name("checkpoint"))
    (results / "models").mkdir()
    write_json(results / "models/m.json", {"files": {}})
    assert measured(results / "models/m") == "", "a dense model has none"


def test_numbers_of_a_post_trained_checkpoint_are_its_own(checkpoint: Path, tmp_path: Path) -> None:
    run, subject = tmp_path / "results/run", {"subject": SUBJECT | {"tuning": "scales"}}
    tuned = run / "tuned/tiny/m/20/scales/seed0/checkpoint"
    write_json(tuned.with_name("manifest.json"), subject)
    before = json.loads((run / "evaluation/tiny/m/20/none/seed0/held-out.json").read_text())
    found = before["corpora"]["c4-test"] | {"perplexity": 27.5}
    evaluation = before | subject | {"corpora": {"c4-test": found}}
    write_json(run / "evaluation/tiny/m/20/scales/seed0/held-out.json", evaluation)
    assert "| perplexity, c4-test | 27.50 ± 0.51 | 6 windows of 256 tokens, float32 |" in measured(tuned)
    assert "| perplexity, c4-test | 31.26 ± 0.51 |" in measured(checkpoint)


def test_numbers_of_a_checkpoint_that_was_made_anew_since_are_left_out(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, manifest = checkpoint.parents[5], checkpoint.with_name("manifest.json")
    recorded = str(manifest.relative_to(run.parents[1]))
    for rule, suite in (("perplexity", "held-out"), ("zero_shot", "zero-shot")):
        record = run / f"records/evaluate_{rule}/tiny/m/20/none/seed0/{suite}.json"
        write_json(record, {"inputs": {recorded: sha256_file(manifest), "other": "abc"}})
    assert "c4-test" in measured(checkpoint)
    write_json(record, {"inputs": {recorded: "of before"}})
    numbers = measured(checkpoint)
    assert "c4-test" in numbers
    assert "piqa" not in numbers
    assert "zero-shot.json: of a checkpoint that was made anew since" in caplog.text


def test_same_is_the_checkpoint_with_its_numbers(checkpoint: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    assert run(checkpoint, "same", tmp_path / "same") == 0
    after = {path.name: path.read_bytes() for path in (tmp_path / "same").iterdir()}
    assert {name for name in before | after if before.get(name) != after.get(name)} == {"README.md"}
    card = after["README.md"].decode()
    assert "31.26 ± 0.51" in card
    assert card.count("## Load") == 1
    assert "trust_remote_code=True" in card
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_gguf_is_one_file(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(checkpoint, "gguf", tmp_path / "model.gguf") == 0
    assert "architecture deci" in capsys.readouterr().out
    expected = load_checkpoint(checkpoint, torch.float32)(IDS).logits[0]
    assert torch.allclose(Graph(tmp_path / "model.gguf").logits(IDS[0]), expected, atol=1e-4)


def test_of_pairs_a_gguf_file_saves_nothing_and_the_command_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    made_from = tmp_path / "tokenizer"
    tiny.tokenizer().save_pretrained(made_from)
    save_checkpoint(MAKES["pairs"](KIND), made_from, folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    from lowrank.export import share

    said = share.export(Export.of(str(folder), "gguf", str(tmp_path / "model.gguf")))
    assert ("multiplied out here" in said) == ((tmp_path / "model.gguf").stat().st_size > 1.1 * size)
    assert "multiplied out here" in said
    assert f"the checkpoint {size:,}" in said


def test_what_cannot_be_is_one_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [
        ("", "dense", tmp_path / "a", "CHECKPOINT: missing; name the folder"),
        (checkpoint, "dense", "", "OUT: missing; name the folder"),
        (checkpoint, "onnx", tmp_path / "a", "TO: 'onnx' is no target; there are same, dense, gguf"),
        (tmp_path, "dense", tmp_path / "a", f"CHECKPOINT: {tmp_path} is no checkpoint, it has no config.json"),
        (checkpoint, "dense", checkpoint, f"OUT: {checkpoint} is there already."),
        (checkpoint, "gguf", tmp_path / "a.bin", f"OUT: {tmp_path / 'a.bin'} must end in .gguf"),
    ]
    assert "torch" not in heavy_imports("--to=onnx", "--", str(checkpoint), "a")
    for folder, to, out, message in wrong:
        assert run(folder, to, out) == 1
        said = capsys.readouterr().err
        assert said.startswith(message)
        assert said.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_a_checkpoint_without_a_dtype_is_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if not k.endswith("dtype")}))
    assert command.main(["--to=same", "--", str(folder), str(tmp_path / "out")]) == 1
    assert "config.json: states no `dtype`" in capsys.readouterr().err


def test_a_changed_checkpoint_is_not_exported(checkpoint: Path, tmp_path: Path) -> None:
    """It is compared with its manifest."""
    with (checkpoint / "config.json").open("a") as file:
        file.write(" ")
    for to in ("same", "dense"):
        assert run(checkpoint, to, tmp_path / "out") == 1
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_was_copied_elsewhere_is_exported_too(checkpoint: Path, tmp_path: Path) -> None:
    """Without the manifest and the evaluations beside it, and, as older ones, without a card."""
    elsewhere = checkpoint.rename(tmp_path / "elsewhere")
    (elsewhere / "README.md").unlink()
    assert run(elsewhere, "dense", tmp_path / "dense") == 0
    assert "## Measured" not in (tmp_path / "dense/README.md").read_text()


def front_matter(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def test_the_hub_reads_the_base_and_the_licence(tmp_path: Path) -> None:
    facts = front_matter(model_card(described("pairs"), tmp_path))
    assert (facts["base_model"], facts["license"]) == ("owner/name", "apache-2.0")
    card = model_card(described("pairs", "Llama 2 Community License", {"path": "/data/secret"}), tmp_path)
    assert front_matter(card)["license"] == "other"
    assert front_matter(card)["license_name"] == "Llama 2 Community License"
    assert "base_model" not in front_matter(card)
    assert "/data/secret" not in card
    unstated = model_card(described("pairs", None), tmp_path)
    assert "Its licence was not stated; it holds for this one too, whatever it is." in unstated


def test_the_preset_on_a_card_makes_the_same_method(tmp_path: Path) -> None:
    """Keys that have no value need not be read; without them the preset is the same one."""
    settings = method_modules()["lord"].Settings
    method = settings(kind="lord", calibration="c4", covariance="naive").plain()
    assert None in method.values()
    card = model_card(described("pairs") | {"method": method}, tmp_path)
    shown = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])[SUBJECT["method"]]
    assert None not in shown.values()
    assert settings(**shown).plain() == method


def test_a_card_says_what_a_config_needs_to_make_it_again(tmp_path: Path) -> None:
    named = {"kind": "lord", "calibration": "c4", "covariance": "naive"}
    card = model_card(described("pairs") | {"method": named}, tmp_path)
    own = "its study may have had its own by these names"
    shipped = f"`use: presets/default.yaml` brings those that rankwise ships; {own}"
    assert f"this preset and those that it names (calibration `c4`, covariance `naive`; {shipped}) makes it" in card
    alone = model_card(described("pairs"), tmp_path)
    assert "A config with the model and this preset makes it again. Where" in alone
    assert "presets/default.yaml" not in alone
    training = {"steps": 3, "best_step": 2}
    tuned = {
        "subject": SUBJECT | {"tuning": "t"},
        "tuning": {"kind": "lora", "instructions": "i"},
        "training": training,
    }
    card = model_card(described("pairs") | {"method": named} | tuned, tmp_path)
    assert "these presets and those that they name (calibration `c4`, covariance `naive`, instructions `i`;" in card


def test_a_prediction_is_called_an_estimate_and_unknown_bytes_are_left_out(tmp_path: Path) -> None:
    rise = {"predicted_loss_rise": {"nats_per_token": 0.142, "meaning": "second order, on the calibration text"}}
    manifest = described("pairs") | rise
    del manifest["base"]["bytes"]
    card = model_card(manifest, tmp_path)
    assert "0.1420 nats a token (second order, on the calibration text). This is an estimate, usually less than" in card
    assert "| bytes of weights | - | 0 | - |" in card


@pytest.mark.parametrize(("make", "saves"), [("identity blocks", False), ("one width", True)])
def test_dense_says_where_nothing_is_saved_and_counts_as_the_table_above_it(
    make: str, saves: bool, tmp_path: Path
) -> None:
    """The indices of identity blocks are no parameters of torch, and count as everywhere."""
    folder, made_from = tmp_path / "checkpoint", tmp_path / "tokenizer"
    tiny.tokenizer().save_pretrained(made_from)
    manifest = described(make)
    save_checkpoint(MAKES[make](KIND), made_from, folder, lambda at: model_card(manifest, at))
    from lowrank.export import share

    said = share.export(Export.of(str(folder), "dense", str(tmp_path / "dense")))
    card, counts = (tmp_path / "dense/README.md").read_text(), manifest["parameters"]
    nothing = f"as large as the base ({counts['total_dense']:,} parameters): nothing is saved in this form"
    assert (nothing not in said, nothing not in card) == (saves, saves)
    assert f"parameters where the compressed checkpoint has {counts['total']:,}" in card
    assert f"| {counts['total_dense']:,} | {counts['total']:,} |" in card


def test_json_of_the_configuration_is_that_of_the_base(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, "dense", tmp_path / "dense")
    found = json.loads((tmp_path / "dense/config.json").read_text())
    assert found["model_type"] == "llama"
    assert not {"recipe", "auto_map"} & set(found)


def test_a_home_folder_is_found(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its sign, which shells leave alone after `CHECKPOINT=`."""
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    wish = Export.of("~/checkpoint", "dense", "~/dense")
    assert (wish.checkpoint, wish.out) == (checkpoint, checkpoint.with_name("dense"))
