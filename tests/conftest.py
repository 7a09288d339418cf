"""One thread and one seed for every test: the same numbers on every run, and no fight over a small machine's cores."""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from books import prepared  # noqa: F401 (a fixture)
from commands import start, start_ranks  # noqa: F401 (fixtures)
from example_data import write_words
from hf_folders import hf_folder  # noqa: F401 (a fixture)
from quick_python import quick_bash, quick_environment  # noqa: F401 (fixtures)

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests and commands first: no process is left alone with a long file at the end."""
    commands = {"start", "start_ranks", "quick_bash"}
    long = Counter(
        item.path
        for item in items
        if item.get_closest_marker("slow") or item.get_closest_marker("distributed") or commands & {*item.fixturenames}
    )
    items.sort(key=lambda item: -long[item.path])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _accelerate_forgets() -> Iterator[None]:
    """Accelerate keeps the precision of a process for good; the next test may want another one."""
    yield
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """A prepared data set of 52 kB in the format of data/enwik8: words drawn at random, with a bit to learn."""
    return write_words(tmp_path_factory.mktemp("data"))
