"""The trainer on several processes: what one process does, whatever goes wrong said by all, no loss with a worker."""

import processes
import pytest
from commands import rank_starter

pytestmark = pytest.mark.distributed


@pytest.fixture
def argv(pretrain_argv):
    return [*pretrain_argv("bert"), "--method", "smoe_dropout", "--eval_sequences", 25]


@pytest.fixture
def trainer(start_ranks, argv):
    return rank_starter(start_ranks, "bert.pretrain", argv)


def test_twenty_steps_are_those_of_one_process(trainer, tmp_path):
    processes.check_equals_one_process(trainer, tmp_path, [(2, 2, False), (4, 2, False), (4, 2, True)])


def test_a_checkpoint_of_four_processes_goes_on_at_one_two_and_four(trainer, tmp_path):
    processes.check_resumes_at_any_number(trainer, tmp_path, fsdp=True)


@pytest.mark.parametrize(
    ("flags", "own", "words"),
    [
        ([], ["--mask_share", 0.2], ["mask_share is 0.15 on rank 0, 0.2 on rank 1"]),
        ([], ["--data", "/nowhere"], ["/nowhere", "prepare.py"]),
        (["--batch_size", 3], [], ["batch_size is 3", "processes, 2"]),
        (["--expert_parallel", 4], [], ["expert_parallel is 4", "2 processes", "1, 2"]),
    ],
)
def test_processes_that_do_not_fit_say_so_each(flags, own, words, trainer, tmp_path):
    processes.check_disagreement(trainer, tmp_path, flags, own, words)
