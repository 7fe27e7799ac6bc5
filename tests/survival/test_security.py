"""Nothing that is fetched or found runs: no pickle, no code of a model, no shell; and secrets stay out of files."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import pickle
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowrank.config.sources import TokensSource
from lowrank.errors import RankwiseError
from lowrank.files import load_tensors
from lowrank.model.checkpoint import load_checkpoint
from lowrank.model.tokenizer import load_tokenizer
from lowrank.post_training.engine_state import SafeCheckpoints
from lowrank.redact import SafeFormatter, without_secrets
from lowrank.sources import archives
from lowrank.sources.local import read_tokens
from lowrank.sources.models import fetch_model
from tests.survival.workshop import VOCABULARY, model_section

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "workflow_scripts"


class Malicious:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """What appears if code of a file has run."""
    return tmp_path / "it-ran"


def payload(trace: Path, kind: str) -> bytes:
    stream = io.BytesIO()
    if kind == "torch":
        torch.save({"weight": Malicious(trace)}, stream)
    elif kind == "old torch":
        torch.save({"weight": Malicious(trace)}, stream, _use_new_zipfile_serialization=False)
    else:
        pickle.dump(Malicious(trace), stream)
    return stream.getvalue()


KINDS = ["torch", "old torch", "pickle"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_payload_is_dangerous(kind: str, trace: Path) -> None:
    """Otherwise the tests below would show nothing."""
    stream = io.BytesIO(payload(trace, kind))
    pickle.load(stream) if kind == "pickle" else torch.load(stream, weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.safetensors"])
def test_a_malicious_file_as_the_weights_of_a_source(
    name: str, kind: str, finished: Path, tmp_path: Path, trace: Path
) -> None:
    source = Path(shutil.copytree(finished / "sources/model", tmp_path / "new"))
    (source / "model.safetensors").unlink()
    (source / name).write_bytes(payload(trace, kind))
    with pytest.raises(RankwiseError, match=r"(never loaded|truncated or damaged)"):
        fetch_model("tiny", model_section(source), tmp_path / "cache", tmp_path / "models/tiny")
    assert not trace.exists()


@pytest.mark.parametrize("named", ["pytorch_model.bin", "../x.safetensors", "/etc/passwd", ["x"], None])
def test_an_index_that_points_elsewhere(named: Any, finished: Path, tmp_path: Path, trace: Path) -> None:
    source = Path(shutil.copytree(finished / "sources/model", tmp_path / "new"))
    shutil.move(source / "model.safetensors", tmp_path / "x.safetensors")
    (source / "pytorch_model.bin").write_bytes(payload(trace, "torch"))
    index = {"metadata": {}, "weight_map": {"model.norm.weight": named}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RankwiseError, match=r"models\.tiny: "):
        fetch_model("tiny", model_section(source), tmp_path / "cache", tmp_path / "models/tiny")
    assert not trace.exists()


def test_a_malicious_file_beside_good_weights_is_left_behind(finished: Path, tmp_path: Path, trace: Path) -> None:
    source = Path(shutil.copytree(finished / "sources/model", tmp_path / "new"))
    for name in ("training_args.bin", "optimizer.pt", "pytorch_model.bin", "tokenizer.pkl", "setup.py"):
        (source / name).write_bytes(payload(trace, "torch"))
    target = tmp_path / "models/tiny"
    fetch_model("tiny", model_section(source), tmp_path / "cache", target)
    assert {path.suffix for path in target.iterdir()} == {".json", ".safetensors"}
    load_checkpoint(target, torch.float32)
    assert not trace.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_malicious_file_in_a_checkpoint(name: str, kind: str, finished: Path, tmp_path: Path, trace: Path) -> None:
    folder = Path(shutil.copytree(finished / "run/compressed/checkpoint", tmp_path / "checkpoint"))
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(payload(trace, kind))
    with pytest.raises(RankwiseError, match=str(folder)):
        load_checkpoint(folder, torch.float32)
    assert not trace.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_malicious_file_as_an_artefact_or_as_state(kind: str, tmp_path: Path, trace: Path) -> None:
    file = tmp_path / "mp_rank_00_model_states.pt"
    file.write_bytes(payload(trace, kind))
    with pytest.raises(RankwiseError, match="damaged, no readable safetensors file"):
        load_tensors(file)
    with pytest.raises(RankwiseError, match=f"damaged, no readable safetensors file.*Delete {tmp_path}"):
        SafeCheckpoints(tmp_path).load(str(file))
    assert not trace.exists()


def test_state_that_would_need_a_pickle_is_not_written(tmp_path: Path, trace: Path) -> None:
    with pytest.raises(RankwiseError, match=r"an object of \S*test_security\.Malicious, which is not stored"):
        SafeCheckpoints(tmp_path).save({"x": Malicious(trace)}, str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["tokens.npz", "tokens.safetensors", "tokens.npy", "tokens.pkl"])
def test_a_malicious_file_of_tokens(name: str, tmp_path: Path, trace: Path) -> None:
    if name.endswith("npz"):
        np.savez(tmp_path / name, tokens=np.array([[Malicious(trace)]], dtype=object))
    else:
        (tmp_path / name).write_bytes(payload(trace, "pickle"))
    with pytest.raises(RankwiseError, match=name):
        read_tokens(TokensSource(tokens=str(tmp_path / name)))
    assert not trace.exists()


# --- code that a model brings ---


def own_code(folder: Path, trace: Path, model_type: str, name: str = "own") -> None:
    """A checkpoint whose classes lie in a file of its own."""
    code = f"import pathlib\npathlib.Path({str(trace)!r}).touch()\nclass Config: pass\nclass Model: pass\n"
    (folder / f"{name}.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": model_type,
        "auto_map": {"AutoConfig": f"{name}.Config", "AutoModelForCausalLM": f"{name}.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("model_type", ["llama", "own", "rankwise_llama"])
def test_a_source_with_code_of_its_own_is_refused(model_type: str, finished: Path, tmp_path: Path, trace: Path) -> None:
    source = Path(shutil.copytree(finished / "sources/model", tmp_path / "new"))
    own_code(source, trace, model_type)
    with pytest.raises(RankwiseError, match=r"(Python code of its own|is unknown here)"):
        fetch_model("tiny", model_section(source), tmp_path / "cache", tmp_path / "models/tiny")
    assert not trace.exists()


@pytest.mark.parametrize("model_type", ["llama", "own"])
def test_code_in_a_checkpoint_does_not_run(model_type: str, finished: Path, tmp_path: Path, trace: Path) -> None:
    folder = Path(shutil.copytree(finished / "run/models/tiny", tmp_path / "checkpoint"))
    own_code(folder, trace, model_type)
    if model_type == "own":
        with pytest.raises(RankwiseError, match=str(folder)):
            load_checkpoint(folder, torch.float32)
    else:
        assert type(load_checkpoint(folder, torch.float32)).__module__.startswith("transformers.")
    assert not trace.exists()


def test_our_own_code_in_a_checkpoint_does_not_run_either(finished: Path, tmp_path: Path, trace: Path) -> None:
    folder = Path(shutil.copytree(finished / "run/compressed/checkpoint", tmp_path / "checkpoint"))
    (folder / "modeling_rankwise.py").write_text(f"import pathlib; pathlib.Path({str(trace)!r}).touch()")
    assert type(load_checkpoint(folder, torch.float32)).__module__ == "lowrank.model.modeling_rankwise"
    assert not trace.exists()


def test_code_of_a_tokenizer_does_not_run(finished: Path, tmp_path: Path, trace: Path) -> None:
    folder = Path(shutil.copytree(finished / "run/models/tiny", tmp_path / "checkpoint"))
    (folder / "own.py").write_text(f"import pathlib; pathlib.Path({str(trace)!r}).touch()")
    file = folder / "tokenizer_config.json"
    wanted = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | wanted))
    try:
        assert len(load_tokenizer(folder)) == VOCABULARY
    except RankwiseError as error:
        assert str(folder) in str(error)  # noqa: PT017 - either is safe
    assert not trace.exists()


# --- archives ---


def tar_of(folder: Path, *members: tuple[str, bytes | str, bytes]) -> Path:
    """A source distribution; a member is its name, its type, and its content or the target of a link."""
    with tarfile.open(folder / "t-1.tar.gz", "w:gz") as tar:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type = kind  # type: ignore[assignment]
            if kind == tarfile.REGTYPE:
                info.size = len(content)
            else:
                info.linkname = content.decode()
            tar.addfile(info, io.BytesIO(content) if kind == tarfile.REGTYPE else None)
    return folder / "t-1.tar.gz"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_file_does_not_go_through_a_link_of_its_archive(kind: bytes, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    members = [("t-1/d", kind, str(outside).encode()), ("t-1/d/evil.txt", tarfile.REGTYPE, b"evil")]
    archives.extract(tar_of(tmp_path, *members), "*", tmp_path / "out")  # type: ignore[arg-type]
    assert not list(outside.iterdir())
    assert (tmp_path / "out/d/evil.txt").read_text() == "evil"
    assert not (tmp_path / "out/d").is_symlink()


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_devices_and_pipes_are_left_out(kind: bytes, tmp_path: Path) -> None:
    members = [("t-1/device", kind, b""), ("t-1/a.txt", tarfile.REGTYPE, b"a")]
    assert archives.extract(tar_of(tmp_path, *members), "*", tmp_path / "out") == [tmp_path / "out/a.txt"]  # type: ignore[arg-type]


def test_a_link_in_a_wheel_becomes_a_plain_file(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("p/link.txt")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "p-1.whl", "w") as wheel:
        wheel.writestr(link, "/etc/passwd")
        wheel.writestr("p/link.txt/evil.txt", "evil")
    (file,) = archives.extract(tmp_path / "p-1.whl", "p/link.txt", tmp_path / "out")
    assert not file.is_symlink()
    assert file.read_text() == "/etc/passwd"


NAMES = ["../evil.txt", "a/../../evil.txt", "/evil.txt", "//evil.txt", "a\\..\\evil.txt", "..", "a/.."]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_out_are_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    deep = tmp_path / "deep/er/out"
    with zipfile.ZipFile(tmp_path / "p-1.whl", "w") as wheel:
        wheel.writestr("fine.txt", "fine")
        wheel.writestr(name, "evil")
    tar = tar_of(tmp_path, ("t-1/fine.txt", tarfile.REGTYPE, b"fine"), (f"t-1/{name}", tarfile.REGTYPE, b"evil"))
    for archive in (tmp_path / "p-1.whl", tar):
        with pytest.raises(RankwiseError, match="leads out of the folder"):
            archives.extract(archive, "*", deep)
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"evil"]


# --- shells and loaders: what the code may not call at all ---

FORBIDDEN = {
    *("eval", "exec", "compile", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("pickle.load", "pickle.loads", "torch.load", "joblib.load", "dill.load", "yaml.unsafe_load", "yaml.full_load"),
    *("marshal.loads", "shelve.open", "tarfile.extractall", "zipfile.extractall", "shutil.unpack_archive"),
}
FILES = [path for path in sorted(SCRIPTS.rglob("*.py")) if "__pycache__" not in path.parts]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SCRIPTS)))
def test_no_file_calls_a_shell_or_unpickles(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in FORBIDDEN, f"{path}:{node.lineno}: {called}"
        assert not called.endswith((".extractall", ".unpack_archive")), f"{path}:{node.lineno}: {called}"
        for keyword in node.keywords:
            value = ast.unparse(keyword.value)
            assert not (keyword.arg == "shell" and value != "False"), f"{path}:{node.lineno}: a shell"
            assert not (keyword.arg == "trust_remote_code" and value != "False"), f"{path}:{node.lineno}"
            assert not (keyword.arg == "allow_pickle" and value != "False"), f"{path}:{node.lineno}"


def test_no_rule_has_a_shell_command() -> None:
    rules = [*(ROOT / "rules").glob("*.smk"), ROOT / "Snakefile"]
    assert len(rules) > 5
    for path in rules:
        words = {line.strip().partition(":")[0] for line in path.read_text().splitlines()}
        assert not {"shell", "run"} & words, path


# --- secrets ---

TOKEN = "hf_" + "aBcDeFgHiJkLmNoP12"
OTHER = "a-token-of-another-form-1234"


@pytest.mark.parametrize(
    "text",
    [
        f"401 for {TOKEN}",
        f"Authorization: Bearer {OTHER}",
        f"headers={{'authorization': 'Bearer {OTHER}'}}",
        f"https://me:{OTHER}@mirror.example/simple",
        f"https://{OTHER}@host/path",
        f"https://me:p@{OTHER}@host/path",
        f"HF_TOKEN={OTHER}",
    ],
)
def test_secrets_are_blackened(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", OTHER)
    assert not {TOKEN, OTHER} & {part for part in (TOKEN, OTHER) if part in without_secrets(text)}
    assert "***" in without_secrets(text)


def test_a_password_may_hold_the_sign_that_ends_it() -> None:
    assert without_secrets("https://me:half@half@host/path") == "https://***@host/path"


@pytest.mark.parametrize("text", ["", "loss 0.5 at https://host/path", "hf_", "a@b.c", "Bearer", "hf_transfer is slow"])
def test_ordinary_text_is_not_changed(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "loss")  # too short to be a token
    assert without_secrets(text) == text


def test_tracebacks_are_logged_without_secrets() -> None:
    try:
        raise ValueError(f"no access with {TOKEN}")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, __file__, 1, "failed: %s", (TOKEN,), sys.exc_info())
    line = SafeFormatter("%(message)s").format(record)
    assert "Traceback" in line
    assert TOKEN not in line


STAGE = """
from types import SimpleNamespace
from lowrank.jobs.stage import run_stage
from lowrank.errors import RankwiseError

def work(job):
    import os, logging
    logging.info("the token is %s", os.environ["HF_TOKEN"])
    raise {kind}("failed with " + os.environ["HF_TOKEN"] + " at https://me:" + os.environ["HF_TOKEN"] + "@host/x")

run_stage(SimpleNamespace(rule="fetch_model", threads=1, log=[{log!r}], resources={{}}, output=[]), work)
"""


@pytest.mark.parametrize("kind", ["RankwiseError", "ValueError", "OSError"])
def test_a_stage_says_no_token(kind: str, tmp_path: Path) -> None:
    log = tmp_path / "stage.log"
    process = subprocess.run(
        [sys.executable, "-c", STAGE.format(kind=kind, log=str(log))],
        env=os.environ | {"PYTHONPATH": str(SCRIPTS), "HF_TOKEN": OTHER},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 1
    for said in (log.read_text(), process.stdout + process.stderr):
        assert OTHER not in said
    assert "failed with ***" in log.read_text()


def test_a_record_of_the_environment_has_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowrank.model.runtime import describe_environment

    monkeypatch.setenv("HF_TOKEN", OTHER)
    assert OTHER not in json.dumps(describe_environment())
