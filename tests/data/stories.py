"""Small stories, and data/bookcorpus/prepare.py run on them."""

import json
import os

import numpy as np
from tokenizers import Tokenizer

from bert.data import Blocks
from data.bookcorpus import prepare as bookcorpus

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards quietly boxed".split()


def name_of(number):
    return chr(97 + number // 10) + chr(97 + number % 10)


def story(number, words=400):
    rng = np.random.default_rng(number)
    lines = [f"Zebra{name_of(number)} comes first."]
    lines += [" ".join(WORDS[i] for i in rng.integers(0, len(WORDS), size=10)) + "." for _ in range(words // 10)]
    return "\n\n".join(lines) + "\n"


def page(title, text):
    return f"<page><title>{title}</title><revision><text xml:space='preserve'>{text}</text></revision></page>"


def run(*flags):
    return bookcorpus.main([str(flag) for flag in flags])


def small(source, out, model="bert", *flags):
    flags = ["--model", model, "--scale", "smoke", "--source", source, "--out", out, "--block_length", 32, *flags]
    return run(*flags, *([] if "--tokenizer" in flags else ["--vocab_size", 320]))


def read(out):
    """What prepare.py wrote, which the trainer must be able to read."""
    meta = json.loads((out / "meta.json").read_text())
    trainers = Blocks(out, meta["model"])
    blocks = {
        split: np.fromfile(out / part["file"], dtype=meta["dtype"]).reshape(-1, meta["block_length"])
        for split, part in meta["splits"].items()
    }
    for split, rows in blocks.items():
        assert np.array_equal(trainers.sequences(split, meta["block_length"]), rows)
    return meta, Tokenizer.from_file(str(out / "tokenizer.json")), blocks
