"""A stage's fingerprint follows the meaning of the code that it can reach, and of no other."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import pytest

from lowrank.reruns.fingerprint import FRAME, PACKAGE, Code

FILES = {
    "stages/search.py": """
        from lowrank.search import run
        from lowrank.jobs.stage import run_stage

        def work():
            run(1)

        def left_over():
            return 0

        run_stage(work)
    """,
    "lowrank/__init__.py": "",
    "lowrank/jobs/stage.py": "def run_stage(work):\n    work()\n",
    "lowrank/search.py": """
        \"""Search.\"""
        import logging
        from functools import cache
        from lowrank import whole, named
        from lowrank.acting import HELD
        from lowrank.config.sections import Inner, Settings

        LOG = logging.getLogger(__name__)
        STEP = 3
        KINDS = {"a": one, "b": other}

        def run(x: int) -> int:
            \"""Run.\"""
            from lowrank.late import f
            settings = Settings()
            return f(x) + STEP + named.used(x) + settings.twice() + KINDS["a"]() + hash(whole)

        def one():
            return 1

        def other():
            return 2

        @cache
        def unused():
            return 3
    """,
    "lowrank/late.py": "def f(x):\n    return _half(x)\n\ndef _half(x):\n    return x / 2\n\ndef g(x):\n    return x\n",
    "lowrank/whole.py": "def all_of_it():\n    return 1\n",
    "lowrank/named.py": "def used(x):\n    return x\n\ndef not_used(x):\n    return x\n",
    "lowrank/acting.py": """
        import sys
        from lowrank.register import add

        HELD = []
        LIMIT = sys.getrecursionlimit()

        def unasked():
            return 5

        @add
        def decorated():
            return 6

        add(7)
    """,
    "lowrank/register.py": "KNOWN = []\n\ndef add(x):\n    KNOWN.append(x)\n    return x\n",
    "lowrank/config/__init__.py": "",
    "lowrank/config/base.py": "class Section:\n    def plain(self):\n        return {}\n",
    "lowrank/config/sections.py": """
        from pydantic import model_validator
        from lowrank.config.base import Section

        LEAST = 1

        class Inner(Section):
            size: int = 1

            def area(self):
                return self.size**2

        Alias = Inner | None

        class Settings(Section):
            alpha: float = 0.5
            inner: Alias = None

            @model_validator(mode="after")
            def _check(self):
                assert self.alpha > LEAST
                return self

            def twice(self):
                return 2 * self.alpha
    """,
    "lowrank/other.py": "y = 1\n",
    "lowrank/method.py": "z = 1\n",
}
PINS = "# pins\ntorch==2.13.0\nPyYAML==6.0.3\nsnakemake==9.27.1\n"


def dedented(text: str) -> str:
    lines = text.lstrip("\n").splitlines()
    indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return "\n".join(line[indent:] for line in lines) + "\n"


def write(folder: Path) -> Path:
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(dedented(text))
    return folder


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    return write(tmp_path)


def of_search(scripts: Path, **only: str) -> str:
    named = {f"lowrank.search.{name}": key for name, key in only.items()}
    return Code(scripts).fingerprint("search", "lowrank.method", only=named)


@pytest.mark.parametrize(
    ("name", "old", "new", "changes"),
    [
        # what the stage reaches
        ("stages/search.py", "run(1)", "run(2)", True),
        ("lowrank/search.py", "return f(x) +", "return f(x) -", True),
        ("lowrank/search.py", "STEP = 3", "STEP = 4", True),
        ("lowrank/search.py", "x: int", "x: float", True),
        ("lowrank/late.py", "return _half(x)", "return -_half(x)", True),  # imported inside a function
        ("lowrank/late.py", "x / 2", "x / 3", True),  # one further
        ("lowrank/method.py", "z = 1", "z = 2", True),  # named by the rule
        ("lowrank/whole.py", "return 1", "return 2", True),  # the module itself is used
        ("lowrank/named.py", "def used(x):\n    return x", "def used(x):\n    return -x", True),
        ("lowrank/search.py", '"b": other', '"b": one', True),
        ("lowrank/search.py", "return 2", "return 22", True),
        # what happens on import, wherever it is
        ("lowrank/acting.py", "add(7)", "add(8)", True),
        ("lowrank/acting.py", "return 6", "return 66", True),  # somebody may find it in a register
        ("lowrank/acting.py", "getrecursionlimit()", "setrecursionlimit(9000)", True),
        ("lowrank/register.py", "KNOWN.append(x)", "KNOWN.insert(0, x)", True),
        # the methods of sections
        ("lowrank/config/sections.py", "2 * self.alpha", "3 * self.alpha", True),
        ("lowrank/config/sections.py", "self.size**2", "self.size**3", True),  # by the annotation of a field
        ("lowrank/config/base.py", "return {}", "return {1: 2}", True),
        # another origin of the same name
        ("lowrank/search.py", "from lowrank.acting import HELD", "from lowrank.register import KNOWN as HELD", True),
        # not what it cannot reach
        ("lowrank/other.py", "y = 1", "y = 2", False),
        ("stages/search.py", "return 0", "return 1", False),
        ("lowrank/search.py", "return 3", "return 4", False),
        ("lowrank/late.py", "def g(x):\n    return x", "def g(x):\n    return -x", False),
        ("lowrank/named.py", "def not_used(x):\n    return x", "def not_used(x):\n    return -x", False),
        ("lowrank/acting.py", "return 5", "return 55", False),
        ("lowrank/jobs/stage.py", "work()", "return work()", False),
        # not fields, defaults and checks, which show in the settings
        ("lowrank/config/sections.py", "alpha: float = 0.5", "alpha: float = 0.6", False),
        ("lowrank/config/sections.py", "self.alpha > LEAST", "self.alpha >= LEAST", False),
        ("lowrank/config/sections.py", "LEAST = 1", "LEAST = 0", False),
        # not how it is written
        ("lowrank/search.py", '"""Run."""', '"""Run, and say so."""', False),
        ("lowrank/late.py", "return _half(x)", "return (_half(  # the half\n        x))", False),
        ("lowrank/search.py", "STEP = 3\n", 'STEP = 3\n"""How far."""\n\n\n', False),
        ("lowrank/search.py", 'KINDS["a"]', "KINDS['a']", False),
    ],
)
def test_only_meaning_changes_it(scripts: Path, name: str, old: str, new: str, changes: bool) -> None:
    before = of_search(scripts)
    path = scripts / name
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))
    assert (of_search(scripts) != before) is changes


def test_a_name_that_comes_from_elsewhere_is_another_meaning(scripts: Path) -> None:
    """All definitions are reached before and after; only who calls which is another."""
    path = scripts / "lowrank/late.py"
    path.write_text(
        "from lowrank.named import used as _half\n\ndef f(x):\n    return _half(x) + h(x)\n\ndef h(x):\n    return x\n"
    )
    before = of_search(scripts)
    path.write_text(
        path.read_text().replace("lowrank.named import used as _half", "lowrank.whole import all_of_it as _half")
    )
    assert of_search(scripts) != before


def test_only_the_entry_of_a_table_of_functions_counts_that_a_job_looks_up(scripts: Path) -> None:
    before = {key: of_search(scripts, KINDS=key) for key in "ab"}
    assert before["a"] != before["b"]
    path = scripts / "lowrank/search.py"
    path.write_text(path.read_text().replace("return 2", "return 22"))
    after = {key: of_search(scripts, KINDS=key) for key in "ab"}
    assert after["a"] == before["a"]
    assert after["b"] != before["b"]
    with pytest.raises(KeyError, match="no dict with a key 'c'"):
        of_search(scripts, KINDS="c")


def test_it_does_not_depend_on_where_the_checkout_is(scripts: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert of_search(scripts) == of_search(write(tmp_path_factory.mktemp("elsewhere")))


def test_a_missing_module_is_an_error(scripts: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no module lowrank\.gone"):
        Code(scripts).fingerprint("search", "lowrank.gone")


@pytest.mark.parametrize("line", ["from .late import f", "from lowrank.late import *"])
def test_imports_that_hide_names_are_refused(scripts: Path, line: str) -> None:
    (scripts / "lowrank/search.py").write_text(f"{line}\n\ndef run(x):\n    return f(x)\n")
    with pytest.raises(SyntaxError, match="hide"):
        of_search(scripts)


def test_packages_are_those_that_reached_code_names(scripts: Path, tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text(PINS)
    late = scripts / "lowrank/late.py"
    late.write_text(
        "import os\nimport torch\n\n" + late.read_text().replace("return _half", "import yaml\n    return _half")
    )

    def packages() -> dict[str, str]:
        return Code(scripts, tmp_path / "requirements.txt").packages("search")

    assert packages() == {"PyYAML": "6.0.3"}, "nothing names torch"
    late.write_text(late.read_text().replace("x / 2", "torch.tensor(x) / 2"))
    assert packages() == {"PyYAML": "6.0.3", "torch": "2.13.0"}


# --- the library as it is ---

REPOSITORY = Path(__file__).parents[3]
SCRIPTS = REPOSITORY / "workflow_scripts"
LIBRARY = sorted((SCRIPTS / "lowrank").rglob("*.py"))


def test_code_is_reached_by_names_alone() -> None:
    """What a fingerprint cannot follow; whoever needs it elsewhere must name the module in the rules first."""
    hidden = (
        *("globals", "eval", "exec", "__import__", "__subclasses__", "__init_subclass__", "__set_name__"),
        *("import_module", "metaclass", "getsource", "getmembers", "iter_modules", "walk_packages"),
    )
    found = set()
    for path in LIBRARY:
        for node in ast.walk(ast.parse(path.read_text())):
            names = {getattr(node, key, None) for key in ("id", "name", "arg")}
            if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Store):
                # `model.eval()` is none of these
                names |= {node.attr} - {"eval"}
            found |= {(path.relative_to(SCRIPTS).as_posix(), name) for name in names & set(hidden)}
    assert found == {
        ("lowrank/compression/compress.py", "import_module"),  # the method's module, which the rule names
        ("lowrank/methods/__init__.py", "import_module"),  # for the check of the config
        ("lowrank/methods/__init__.py", "iter_modules"),
        ("lowrank/jobs/forkserver.py", "import_module"),  # of packages, before a job's own modules are
        ("lowrank/jobs/worker.py", "import_module"),  # the module of a function that its caller names
    }


def test_the_frame_is_what_stages_run_in_and_no_part_of_the_library() -> None:
    frame = re.compile(rf"(import|from) {FRAME}\b|from {PACKAGE} import .*\bstage\b")
    assert not [path for path in LIBRARY if frame.search(path.read_text())]
    texts = [path.read_text() for path in (SCRIPTS / "stages").glob("*.py")]
    used = {name for text in texts for name in re.findall(rf"from {FRAME} import (.*)", text)}
    assert used == {"run_stage", "log"}


def test_modules_that_code_names_as_text_are_named_in_the_rules() -> None:
    """Started as processes, or imported by them."""
    texts = {
        node.value
        for path in LIBRARY
        if path.name != "fingerprint.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    modules = {text.partition(":")[0] for text in texts if re.fullmatch(rf"{PACKAGE}(\.\w+)+(:\w+)?", text)}
    rules = (REPOSITORY / "rules/settings.smk").read_text()
    assert modules
    assert all(f'"{module}"' in rules for module in modules)


NAMED = {"post_train": ["lowrank.post_training.worker"]}


@pytest.mark.parametrize(
    ("stage", "function", "counts"),
    [
        ("post_train", "lowrank.post_training.train:train", True),
        ("post_train", "lowrank.jobs.worker:main", True),
        ("post_train", "lowrank.post_training.distillation:distil_block", False),
        ("distil_features", "lowrank.post_training.distillation:distil_block", True),
        ("distil_features", "lowrank.post_training.train:train", False),
        ("evaluate_perplexity", "lowrank.jobs.worker:main", True),
        ("compute_bases", "lowrank.bases.block:bases_of_block", True),
        ("compute_bases", "lowrank.search.search:search_allocation", False),
        ("eliminate_neurons", "lowrank.bases.block:basis_of", True),
        ("eliminate_neurons", "lowrank.methods.rankwise:compress", False),
        ("eliminate_neurons", "lowrank.ranks.groups:combined", False),
        ("evaluate_perplexity", "lowrank.methods.svd:compress", False),
        ("make_table", "lowrank.paper.figures.search:draw_search", False),
    ],
)
def test_who_runs_what(stage: str, function: str, counts: bool, tmp_path: Path) -> None:
    module, name = function.split(":")
    copied = tmp_path / "scripts"
    shutil.copytree(SCRIPTS, copied, ignore=shutil.ignore_patterns("__pycache__", ".mypy_cache"))
    path = (copied / module.replace(".", "/")).with_suffix(".py")
    lines = path.read_text().splitlines(keepends=True)
    (found,) = [each for each in ast.parse("".join(lines)).body if getattr(each, "name", None) == name]
    assert isinstance(found, ast.FunctionDef)
    lines.insert(found.body[-1].lineno - 1, f"{' ' * found.body[-1].col_offset}assert True\n")
    before = Code(copied).fingerprint(stage, *NAMED.get(stage, []))
    path.write_text("".join(lines))
    assert (Code(copied).fingerprint(stage, *NAMED.get(stage, [])) != before) is counts
