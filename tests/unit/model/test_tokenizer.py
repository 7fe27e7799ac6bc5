"""A tokenizer opens without the classes of models, and beside a compressed model as beside the dense one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lowrank.model.checkpoint import load_checkpoint, replace_modules, save_checkpoint
from lowrank.model.factors import LowRankFactors
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


def save_compressed(kind: str, source: Path, target: Path) -> None:
    model = tiny.model(kind)
    name = "model.layers.0.mlp.down_proj"
    rows, columns = model.get_submodule(name).weight.shape
    replace_modules(model, {name: LowRankFactors(torch.ones(4, columns), torch.ones(rows, 4), None)})
    save_checkpoint(model, source, target)


def of_its_own() -> PreTrainedTokenizerFast:
    """Digits three at a time, as OLMo 2 and Phi-4 have them: GPT-2 splits texts in another way."""
    made = tiny.tokenizer()
    split = pre_tokenizers.Split(Regex("[0-9]{1,3}|[^0-9]+"), "isolated")
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return made


@pytest.mark.parametrize(
    ("kind", "stated"),
    [
        *(("olmo2", "GPT2Tokenizer"), ("olmo2", "PreTrainedTokenizerFast"), ("phi3", "GPT2Tokenizer")),
        *(("phi3", "LlamaTokenizer"), ("mistral", "LlamaTokenizer"), ("llama", "LlamaTokenizer")),
        *(("llama", "GPT2Tokenizer"), ("qwen2", "Qwen2Tokenizer"), ("qwen2", None)),
    ],
)
def test_a_compressed_model_reads_texts_as_the_dense_one(kind: str, stated: str | None, tmp_path: Path) -> None:
    """transformers takes the stated class for some types of models and a class of its own for others."""
    source, target, again = tmp_path / "source", tmp_path / "target", tmp_path / "again"
    tiny.model(kind).save_pretrained(source)
    of_its_own().save_pretrained(source)
    path = source / "tokenizer_config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key != "tokenizer_class"}
    path.write_text(json.dumps(config | ({"tokenizer_class": stated} if stated else {})))
    save_compressed(kind, source, target)
    save_compressed(kind, target, again)  # as post-training does
    text = "  river 20231 stone, it's  a 7"
    expected = load_tokenizer(source)
    for copy in (target, again):
        found = load_tokenizer(copy)
        assert type(found) is type(expected)
        assert found(text)["input_ids"] == expected(text)["input_ids"]
        written = json.loads((copy / "tokenizer_config.json").read_text()).get("tokenizer_class")
        assert written != "TokenizersBackend", "readers before transformers 5 do not know it"


def test_a_tokenizer_without_a_config_is_read_as_beside_the_dense_model(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    tiny.model("olmo2").save_pretrained(source)
    of_its_own().save_pretrained(source)
    (source / "tokenizer_config.json").unlink()
    save_compressed("olmo2", source, target)
    text = "river 20231 stone"
    assert load_tokenizer(target)(text)["input_ids"] == load_tokenizer(source)(text)["input_ids"]
