"""One thread and one seed for every test: the same numbers on every run, and no fight over a small machine's cores."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from books import prepared  # noqa: F401 (a fixture)
from commands import start, start_ranks  # noqa: F401 (fixtures)
from hf_folders import hf_folder  # noqa: F401 (a fixture)
from quick_python import quick_bash, quick_environment  # noqa: F401 (fixtures)

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


SIZES = {"train": 40_000, "valid": 6_000, "test": 6_000}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """A prepared data set of 52 kB in the format of data/enwik8: words drawn at random, with a bit to learn."""
    import numpy as np

    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, size=rng.integers(2, 8), dtype=np.uint8)) for _ in range(50)]
    text = b" ".join(words[i] for i in rng.integers(0, 50, size=20_000))[: sum(SIZES.values())]
    folder = tmp_path_factory.mktemp("data")
    meta = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest(), "splits": {}}
    position = 0
    for name, size in SIZES.items():
        part = text[position : position + size]
        (folder / f"{name}.bin").write_bytes(part)
        meta["splits"][name] = {"file": f"{name}.bin", "bytes": size, "sha256": hashlib.sha256(part).hexdigest()}
        position += size
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder
