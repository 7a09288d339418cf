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


def save_tokenizer(source: Any, part: Path) -> None:
    """The tokenizer itself, or the files of one in a folder, be it given or the one that a model came from."""
    given = not isinstance(source, nn.Module)
    if not given:
        source = source.name_or_path or None
        if source is None or not Path(source).is_dir():
            return
    if not isinstance(source, (str, Path)):
        source.save_pretrained(part)
        return
    files = [Path(source) / name for name in TOKENIZER_FILES if (Path(source) / name).is_file()]
    if given and not files:
        raise ValueError(f"tokenizer is {str(source)!r}, a folder without a tokenizer's files")
    for file in files:
        shutil.copyfile(file, part / file.name)
