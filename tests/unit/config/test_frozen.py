"""What jobs read of a config: what their head has read, whatever lies there by now."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lowrank.config.frozen import FROZEN, freeze, frozen_study
from lowrank.config.load import load_study
from lowrank.config.sources import FoundShape
from lowrank.config.yaml_file import read_yaml
from lowrank.errors import RankwiseError
from tests import tiny

HEAD = {"token": "one"}
CONFIGS = sorted((Path(__file__).parents[3] / "config").glob("*.yaml"))


@pytest.fixture(autouse=True)
def no_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name != FROZEN})


@pytest.mark.parametrize("config", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_job_has_the_study_of_its_head(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert frozen_study() is None
    freeze(read_yaml(config), [config], HEAD, tmp_path / "frozen.json")
    monkeypatch.chdir(tmp_path.parent)
    assert frozen_study() == load_study(config, unseen=True)


def test_shapes_are_those_that_the_head_has_found(tmp_path: Path) -> None:
    """Another node may not see the model's folder; and who states a shape and who leaves it out are told apart."""
    tiny.model("llama").save_pretrained(tmp_path / "model")
    raw = read_yaml(CONFIGS[0].with_name("quickstart.yaml"))
    raw["models"]["smollm2-135m"] = {"source": {"path": str(tmp_path / "model")}, "max_length": 64}
    freeze(raw, [CONFIGS[0]], HEAD, tmp_path / "frozen.json")
    (tmp_path / "model").rename(tmp_path / "gone")
    study = frozen_study()
    assert study is not None
    shape = study.models["smollm2-135m"].shape
    assert isinstance(shape, FoundShape)
    assert shape.layers == tiny.LAYERS


def test_a_job_of_a_head_that_another_has_followed_stops(tmp_path: Path) -> None:
    target = tmp_path / "frozen.json"
    freeze(read_yaml(CONFIGS[0]), [CONFIGS[0]], HEAD, target)
    told = os.environ[FROZEN]
    freeze(read_yaml(CONFIGS[0]), [CONFIGS[0]], {"token": "another"}, target)  # by the same config
    assert frozen_study() is not None
    os.environ[FROZEN] = told
    with pytest.raises(RankwiseError, match=r"frozen\.json: another start of this run has written"):
        frozen_study()
    target.unlink()
    with pytest.raises(RankwiseError, match=r"frozen\.json: the config of this run cannot be read"):
        frozen_study()
