"""The tokenizer of a checkpoint, apart from models: their classes take seconds to load, which not every job needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lowrank.errors import RankwiseError
from lowrank.files import check_manifest


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
