"""A tokenizer opens without the classes of models, in a process that has loaded nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lowrank.model.checkpoint import load_checkpoint
from lowrank.model.tokenizer import load_tokenizer
from tests import tiny

LIBRARY = Path(load_tokenizer.__code__.co_filename).parents[2]
OPENS = """
import sys
import lowrank.calibration.corpora
from lowrank.model.tokenizer import load_tokenizer
print(load_tokenizer(sys.argv[1])("river stone")["input_ids"])
print("transformers.modeling_utils" in sys.modules)
"""


def test_it_is_opened_without_classes_of_models(tmp_path: Path) -> None:
    tiny.model("llama").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(LIBRARY), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", OPENS, str(tmp_path)]
    said = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout
    expected = tiny.tokenizer()("river stone")["input_ids"]
    assert said.splitlines() == [str(expected), "False"]
    assert "modeling_utils" in load_checkpoint.__globals__["PreTrainedModel"].__module__, "what the check looks for"
