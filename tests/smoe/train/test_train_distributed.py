"""What several processes of a run do together, apart from any trainer."""

import pytest
import torch.distributed as dist
from ranks import run_ranks

from smoe.train.distributed import DistributedProcesses


def _leave(rank: int) -> bool:
    DistributedProcesses(60).leave()
    return dist.is_initialized()


@pytest.mark.distributed
def test_the_process_group_lasts_as_long_as_the_process():
    """Destroyed under a model that DDP wraps, it hangs now and then: `smoe.errors` says why."""
    assert run_ranks(_leave, 2) == [True, True]
