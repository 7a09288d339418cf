"""The tokenizer that goes with a model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn

# Whatever tokenizer a folder holds, as Transformers and SentencePiece name its files.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json"),
)


def check_tokenizer(source: Any) -> None:
    """A ValueError if it is a folder that holds none."""
    if isinstance(source, (str, Path)) and not _files(source):
        raise ValueError(f"tokenizer is {str(source)!r}, a folder without a tokenizer's files")


def save_tokenizer(source: Any, part: Path) -> None:
    """The tokenizer itself, or the files of one in a folder, be it given or the one that a model came from."""
    if isinstance(source, nn.Module):
        source = source.name_or_path or None
        if source is None or not Path(source).is_dir():
            return
    if not isinstance(source, (str, Path)):
        source.save_pretrained(part)
        return
    for file in _files(source):
        shutil.copyfile(file, part / file.name)


def _files(folder: str | Path) -> list[Path]:
    return [Path(folder) / name for name in TOKENIZER_FILES if (Path(folder) / name).is_file()]
