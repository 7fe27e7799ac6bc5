"""The tokenizer of a checkpoint, apart from models: their classes take seconds to load, which not every job needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lowrank.errors import RankwiseError
from lowrank.manifest import check_manifest


def load_tokenizer(folder: str | Path) -> Any:
    """Open the tokenizer that lies in a checkpoint folder.

    Raises:
        RankwiseError: there is none that can be read, or it is not the one that the manifest describes.
    """
    folder = Path(folder)
    check_manifest(folder, "files", skip=(".safetensors",))
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # by the damage, whatever the tokenizers library raises, bare `Exception` included
        raise RankwiseError(
            f"{folder}: the tokenizer cannot be opened: {error}. Delete the folder and run the workflow again."
        ) from error


def keep_tokenizer_class(source: Path, copy: Path) -> None:
    """Have the copy of a tokenizer opened as the same class as the original, beside a model of another type.

    For some types of models transformers takes a class of its own choice, whatever `tokenizer_class` of
    tokenizer_config.json says (`GPT2Tokenizer` for OLMo 2 and Phi-4); beside a model of ours it would obey, and split
    texts in another way.

    Args:
        source: checkpoint folder of the original.
        copy: folder with the same tokenizer's files and another config.json; its tokenizer_config.json is changed.
    """
    try:
        original, copied = (_class_of(folder) for folder in (source, copy))
    except (OSError, ValueError):
        return  # there is no tokenizer
    if original == copied:
        return
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    # Older readers know the class that opens any tokenizer.json by this name only.
    config["tokenizer_class"] = "PreTrainedTokenizerFast" if original == "TokenizersBackend" else original
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _class_of(folder: Path) -> str:
    return type(AutoTokenizer.from_pretrained(folder, trust_remote_code=False)).__name__
