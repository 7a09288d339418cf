"""One thread and one seed for every test: the same numbers on every run, and no fight over a small machine's cores."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
