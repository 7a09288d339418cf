"""A tokenizer whose tokens are bytes, as Transformers reads it (tokenizer.json) and llama.cpp (tokenizer.model)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

SPECIAL = ("<unk>", "<s>", "</s>")
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece writes a space so; it is a token of its own beside the bytes
VOCAB_SIZE = len(SPECIAL) + 256 + 1


def encode(text: bytes) -> np.ndarray:
    """(number of bytes,) int64 token ids."""
    ids = np.frombuffer(text, dtype=np.uint8).astype(np.int64) + len(SPECIAL)
    ids[ids == ord(" ") + len(SPECIAL)] = VOCAB_SIZE - 1
    return ids


def save(folder: Path) -> None:
    """Writes the tokenizer into ``folder`` in both formats."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), SPACE]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    names["add_prefix_space"] = False  # llama.cpp would put a space before the text
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(_sentencepiece(pieces))


def _sentencepiece(pieces: list[str]) -> bytes:
    from transformers.utils import sentencepiece_model_pb2_new as sentencepiece

    model = sentencepiece.ModelProto()
    model.trainer_spec.model_type = sentencepiece.TrainerSpec.BPE
    model.trainer_spec.vocab_size = len(pieces)
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    kind = sentencepiece.ModelProto.SentencePiece
    for i, piece in enumerate(pieces):
        entry = model.pieces.add()
        entry.piece, entry.score = piece, 0.0
        entry.type = kind.UNKNOWN if i == 0 else kind.CONTROL if i < len(SPECIAL) else kind.BYTE
        if piece == SPACE:
            entry.type = kind.NORMAL
    return model.SerializeToString()
