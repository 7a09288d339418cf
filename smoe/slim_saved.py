"""Slimming a Hugging Face model that smoe has saved: its own tokenizer reads the texts that vote."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .control import activated, smoe_layers
from .errors import one_line
from .modulize.load import from_pretrained
from .modulize.save import save_pretrained
from .new_folder import new_folder
from .slim import slim, vote
from .slim_options import check_slim_options

_TEXTS = 8  # of a batch
_TOKENS = 512  # of a text, at most


def slim_saved(path: Path, data: Path, options: argparse.Namespace) -> None:
    """Writes the model and the tokenizer of the folder ``path`` with fewer experts.

    Args:
        data: a file with one text per line. options: see ``smoe.slim_options``.

    Raises ValueError for a model without SMoE layers or of two parts, texts or options that can't be used.
    """
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = from_pretrained(path)
    if not smoe_layers(model):
        raise ValueError(f"--model {path}: {type(model).__name__} has no SMoE layers; there is nothing to slim")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"--model {path}: is an encoder and a decoder, which texts alone can't feed; use smoe.vote")
    num_experts = min(layer.num_experts for _, layer in smoe_layers(model))
    check_slim_options(options, num_experts)
    texts = [line for line in data.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if not texts:
        raise ValueError(f"--data {data}: has no text")
    with new_folder(options.out, "out") as folder:
        try:
            # Without any file AutoTokenizer would make one that knows no word.
            if not (path / "tokenizer_config.json").is_file():
                raise FileNotFoundError("there is no tokenizer_config.json")
            tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"--model {path}: has no tokenizer that can be read: {one_line(error)}") from None
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        positions = getattr(model.config, "max_position_embeddings", None) or _TOKENS
        longest = min(_TOKENS, positions, tokenizer.model_max_length)
        batches = (
            tokenizer(texts[i : i + _TEXTS], padding=True, truncation=True, max_length=longest, return_tensors="pt")
            for i in range(0, min(len(texts), _TEXTS * options.batches), _TEXTS)
        )
        if options.keep < num_experts:  # else all stay, whatever the votes
            k = options.keep if options.k is None else options.k
            torch.manual_seed(0)  # of what a router draws at random (THOR)
            with activated(model, k):
                votes = vote(model, batches, score=options.score)
            slim(model, votes, options.keep)
        save_pretrained(model, folder)
        tokenizer.save_pretrained(folder)
    print(f"{options.keep} of {num_experts} experts per layer: {options.out}")
