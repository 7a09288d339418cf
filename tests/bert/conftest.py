"""Prepared data of synthetic stories, and the trainer of BERT and RoBERTa as a fixture."""

import importlib.util
import os
from pathlib import Path

import pytest
from commands import Command, starter

ROOT = Path(__file__).parents[2]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


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


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """prepared(model) -> a folder of data/bookcorpus/prepare.py: ten stories, blocks of 64 tokens."""
    spec = importlib.util.spec_from_file_location("bookcorpus_prepare", ROOT / "data/bookcorpus/prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    source = tmp_path_factory.mktemp("stories")
    for number, text in enumerate(stories(10)):
        (source / f"{number}.txt").write_text(text)
    folders = {}

    def prepared(model: str) -> Path:
        if model not in folders:
            out = tmp_path_factory.mktemp(model)
            flags = ["--model", model, "--scale", "smoke", "--source", source, "--out", out]
            flags += ["--vocab_size", 300, "--block_length", 64]
            assert module.main([str(flag) for flag in flags]) == 0
            folders[model] = out
        return folders[model]

    return prepared


@pytest.fixture
def pretrain_argv(prepared):
    """pretrain_argv(model) -> flags of the trainer at smoke scale in fp32.

    The sweep has two k: counting FLOPs takes most of such a run's time.
    """

    def pretrain_argv(model: str) -> list[object]:
        argv = ["--model", model, "--scale", "smoke", "--data", prepared(model), "--precision", "fp32"]
        return [*argv, "--progress", "false", "--sweep", "[1,16]"]

    return pretrain_argv


@pytest.fixture
def pretrain(start, pretrain_argv):
    """pretrain(model, method, run_dir, *flags, wait=True) -> Command: the trainer, waited for."""

    def pretrain(model: str, method: str, run_dir: Path, *flags: object, wait: bool = True) -> Command:
        trainer = starter(start, "bert.pretrain", pretrain_argv(model))
        return trainer(run_dir, "--method", method, *flags, wait=wait)

    return pretrain
