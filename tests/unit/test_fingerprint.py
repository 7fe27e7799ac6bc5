"""A stage's fingerprint follows the meaning of the code it uses."""

import re
import shutil
from pathlib import Path

import pytest

from lowrank.fingerprint import fingerprint

FILES = {
    "stages/search.py": "from lowrank.search import run\n\n\ndef work():\n    run(1)\n",
    "lowrank/__init__.py": "",
    "lowrank/search.py": (
        '"""Search."""\n\n\ndef run(x):\n    """Run."""\n    from lowrank import late\n    return late.f(x)\n'
    ),
    "lowrank/late.py": "def f(x):\n    return x\n",
    "lowrank/other.py": "y = 1\n",
    "lowrank/method.py": "z = 1\n",
}


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "old", "new", "changes"),
    [
        ("stages/search.py", "run(1)", "run(2)", True),
        ("lowrank/search.py", "late.f(x)", "late.f(-x)", True),
        ("lowrank/late.py", "return x", "return x + 1", True),  # imported inside a function
        ("lowrank/method.py", "z = 1", "z = 2", True),  # named by the rule
        ("lowrank/other.py", "y = 1", "y = 2", False),  # nobody imports it
        ("lowrank/search.py", '"""Run."""', '"""Run, and say so."""', False),
        ("lowrank/late.py", "return x", "return (x)  # as it is", False),
    ],
)
def test_only_meaning_changes_it(scripts: Path, name: str, old: str, new: str, changes: bool) -> None:
    before = fingerprint(scripts, "search", "lowrank.method")
    path = scripts / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert (fingerprint(scripts, "search", "lowrank.method") != before) is changes


def test_it_does_not_depend_on_where_the_checkout_is(scripts: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("elsewhere")
    for name, text in FILES.items():
        (other / name).parent.mkdir(exist_ok=True)
        (other / name).write_text(text)
    assert fingerprint(scripts, "search") == fingerprint(other, "search")


REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def copied_scripts(tmp_path: Path) -> Path:
    scripts = tmp_path / "workflow_scripts"
    shutil.copytree(REPOSITORY / "workflow_scripts", scripts, ignore=shutil.ignore_patterns("__pycache__"))
    return scripts


def test_every_module_that_is_started_as_a_process_is_named_in_the_rules() -> None:
    texts = [path.read_text() for path in (REPOSITORY / "workflow_scripts").rglob("*.py")]
    started = {name for text in texts for name in re.findall(r'"-m", "(lowrank[a-z_.]+)"', text)}
    assert started
    rules = (REPOSITORY / "rules/common.smk").read_text()
    assert all(f'"{name}"' in rules for name in started)


def test_the_training_loop_is_code_of_the_post_training(copied_scripts: Path) -> None:
    before = fingerprint(copied_scripts, "post_train", "lowrank.post_training.worker")
    train = copied_scripts / "lowrank/post_training/train.py"
    train.write_text(train.read_text() + "\nNEW = 1\n")
    assert fingerprint(copied_scripts, "post_train", "lowrank.post_training.worker") != before


def test_the_sections_of_the_config_are_no_code_of_a_stage(copied_scripts: Path) -> None:
    stages = [path.stem for path in (copied_scripts / "stages").glob("*.py")]
    before = [fingerprint(copied_scripts, stage) for stage in stages]
    sections = copied_scripts / "lowrank/config/presets.py"
    sections.write_text(sections.read_text() + "\nNEW = 1\n")
    assert [fingerprint(copied_scripts, stage) for stage in stages] == before
