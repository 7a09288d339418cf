"""Vocabularies: BERT (WordPiece, lower case), RoBERTa (byte-level BPE): learned from a corpus, or read from files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Start, end, padding, unknown, mask.
SPECIAL = {
    "bert": {"start": "[CLS]", "end": "[SEP]", "pad": "[PAD]", "unknown": "[UNK]", "mask": "[MASK]"},
    "roberta": {"start": "<s>", "end": "</s>", "pad": "<pad>", "unknown": "<unk>", "mask": "<mask>"},
}
_ORDER = {
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "roberta": ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
}


def train_tokenizer(model: str, lines: Callable[[], Iterable[str]], vocab_size: int) -> Tokenizer:
    """A vocabulary of at most `vocab_size` entries for `model` (bert or roberta), learned from what `lines()` yields.

    The same text gives the same vocabulary.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    options = {"vocab_size": vocab_size, "show_progress": False}
    if model == "roberta":
        tokenizer = Tokenizer(models.BPE())
        _complete(tokenizer, model)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = list(_ORDER[model])
        tokenizer.train_from_iterator(
            lines(), trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, **options)
        )
        return tokenizer
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    _complete(tokenizer, model)
    # The library numbers the letters within words ("##a") in the order of a hash map, which differs from run to run and
    # decides between equally frequent pairs. As special tokens they get their numbers beforehand.
    letters = _letters(tokenizer, lines(), most=min(1000, vocab_size // 8))
    special = [*_ORDER[model], *(f"##{letter}" for letter in letters)]
    trainer = trainers.WordPieceTrainer(
        special_tokens=special, initial_alphabet=letters, limit_alphabet=len(letters), **options
    )
    tokenizer.train_from_iterator(lines(), trainer)
    # The same vocabulary, in which these letters are no special tokens.
    learned = Tokenizer(models.WordPiece(tokenizer.get_vocab(), unk_token="[UNK]"))
    _complete(learned, model)
    return learned


def _letters(tokenizer: Tokenizer, lines: Iterable[str], most: int) -> list[str]:
    """The most frequent characters of the normalised text, sorted."""
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(tokenizer.normalizer.normalize_str(line))
    frequent = sorted((letter for letter in counts if not letter.isspace()), key=lambda c: (-counts[c], c))
    return sorted(frequent[:most])


def read_tokenizer(model: str, paths: Sequence[Path]) -> Tokenizer:
    """The vocabulary in a folder or files: tokenizer.json, or vocab.txt (BERT), or vocab.json and merges.txt (RoBERTa).

    Raises ValueError, in one line, when they don't exist, can't be read or lack one of the model's special tokens.
    """
    from tokenizers import Tokenizer, models

    files = {file.name: file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])}
    shown = ", ".join(map(str, paths))
    missing = [str(file) for file in files.values() if not file.exists()]
    if missing:
        raise ValueError(f"tokenizer: no such file: {missing[0]}")
    try:
        if "tokenizer.json" in files:
            tokenizer = Tokenizer.from_file(str(files["tokenizer.json"]))
            tokenizer.no_padding()
            tokenizer.no_truncation()
        elif model == "bert" and "vocab.txt" in files:
            tokenizer = Tokenizer(models.WordPiece.from_file(str(files["vocab.txt"]), unk_token="[UNK]"))
            _complete(tokenizer, model)
        elif model == "roberta" and {"vocab.json", "merges.txt"} <= files.keys():
            tokenizer = Tokenizer(models.BPE.from_file(str(files["vocab.json"]), str(files["merges.txt"])))
            _complete(tokenizer, model)
        else:
            wanted = "vocab.txt" if model == "bert" else "vocab.json and merges.txt"
            raise ValueError(f"tokenizer: {shown} has neither tokenizer.json nor {wanted}, which {model} needs")
    except ValueError:
        raise
    except Exception as error:  # the library raises plain Exception for a damaged file
        raise ValueError(f"tokenizer: {shown} can't be read: {' '.join(str(error).split())}") from None
    for token in SPECIAL[model].values():
        if tokenizer.token_to_id(token) is None:
            raise ValueError(f"tokenizer: {shown} has no {token}, which {model} needs")
    return tokenizer


def special_ids(tokenizer: Tokenizer, model: str) -> dict[str, int]:
    """Ids of `start`, `end`, `pad`, `unknown` and `mask`."""
    return {role: tokenizer.token_to_id(token) for role, token in SPECIAL[model].items()}


def _complete(tokenizer: Tokenizer, model: str) -> None:
    """Add what a vocabulary alone lacks: how text is normalised and cut into words, and which tokens are special."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    if model == "bert":
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
    else:
        # A word is the same token at the start of a paragraph as within it.
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.get_vocab_size() > 0:
        tokenizer.add_special_tokens([token for token in _ORDER[model] if tokenizer.token_to_id(token) is not None])
