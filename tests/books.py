"""Prepared blocks of tokens of synthetic stories; a fixture for all tests."""

from pathlib import Path

import pytest

from data.bookcorpus import prepare


def stories(count: int, seed: int = 0, words: int = 1500) -> list[str]:
    """Texts of paragraphs with sentences, each of words of its own besides the common ones."""
    import numpy as np

    rng = np.random.default_rng(seed)
    common = ["".join(map(chr, rng.integers(97, 123, size=rng.integers(2, 7)))) for _ in range(60)]
    texts = []
    for number in range(count):
        text = " ".join(
            (common[i].capitalize() + "." if n % 9 == 8 else common[i])
            for n, i in enumerate(rng.integers(0, len(common), size=words))
        )
        texts.append(f"Story {number}.\n\n" + text.replace(". ", ".\n\n"))
    return texts


def write_books(model: str, source: Path, out: Path) -> Path:
    """Ten stories in `source`, prepared for `model` in `out`: blocks of 64 tokens."""
    for number, text in enumerate(stories(10)):
        (source / f"{number}.txt").write_text(text)
    flags = ["--model", model, "--scale", "smoke", "--source", source, "--out", out]
    flags += ["--vocab_size", 300, "--block_length", 64]
    assert prepare.main([str(flag) for flag in flags]) == 0
    return out


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """prepared(model) -> a folder of data/bookcorpus/prepare.py: ten stories, blocks of 64 tokens."""
    source = tmp_path_factory.mktemp("stories")
    folders = {}

    def prepared(model: str) -> Path:
        if model not in folders:
            folders[model] = write_books(model, source, tmp_path_factory.mktemp(model))
        return folders[model]

    return prepared
