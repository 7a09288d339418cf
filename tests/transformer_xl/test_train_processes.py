"""The trainer on several processes: what one process does, whatever goes wrong said by all, no loss with a worker."""

import processes
import pytest

pytestmark = pytest.mark.distributed


@pytest.fixture
def trainer(start_ranks, train_argv):
    def trainer(run_dir, *flags, ranks=1, own=None):
        argv = [*train_argv, "--method", "smoe_dropout", "--run_dir", run_dir, *flags]
        return start_ranks(ranks, "transformer_xl.train", *argv, own=own)

    return trainer


def test_twenty_steps_are_those_of_one_process(trainer, tmp_path):
    processes.check_equals_one_process(trainer, tmp_path, [(2, 2), (4, 2)])


@pytest.mark.slow
def test_twenty_steps_with_data_or_experts_alone_spread(trainer, tmp_path):
    processes.check_equals_one_process(trainer, tmp_path, [(2, 1), (4, 1), (4, 4)])


def test_a_checkpoint_of_four_processes_goes_on_at_one_two_and_four(trainer, tmp_path):
    processes.check_resumes_at_any_number(trainer, tmp_path)


@pytest.mark.parametrize(
    ("flags", "own", "words"),
    [
        ([], ["--seed", 2], ["seed is 1 on rank 0, 2 on rank 1"]),
        ([], ["--k_max", 9], ["k_max is None on rank 0, 9 on rank 1"]),
        ([], ["--k_max", 17], ["k_max is 17", "num_experts = 16"]),
        ([], ["--data", "/nowhere"], ["/nowhere", "prepare.py"]),
        (["--batch_size", 3], [], ["batch_size: 3", "2 processes"]),
        (
            ["--num_experts", 6, "--d_hidden", 96, "--expert_parallel", 4],
            [],
            ["expert_parallel is 4", "num_experts = 6"],
        ),
        (["--expert_parallel", 4], [], ["expert_parallel is 4", "2 processes", "1, 2"]),
    ],
)
def test_processes_that_do_not_fit_say_so_each(flags, own, words, trainer, tmp_path):
    processes.check_disagreement(trainer, tmp_path, flags, own, words)


def test_processes_with_other_data_say_so(trainer, data_dir, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(data_dir, other)
    meta = other / "meta.json"
    meta.write_text(meta.read_text().replace('"sha256": "', '"sha256": "0', 1))
    processes.check_disagreement(trainer, tmp_path, [], ["--data", other], ["data is", "on rank 0", "on rank 1"])


def test_a_process_that_never_comes_is_not_waited_for_longer_than_allowed(start, train_argv, tmp_path):
    from commands import free_port
    from runs import assert_one_line

    env = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    argv = [*train_argv, "--method", "smoe_dropout", "--run_dir", tmp_path / "run", "--process_timeout", 2]
    assert_one_line(start("transformer_xl.train", *argv, env=env), 1, "lost contact with another process")


def test_a_signal_to_one_stops_all(trainer, tmp_path):
    processes.check_signal_to_one_stops_all(trainer, tmp_path)


def test_the_death_of_one_is_noticed(trainer, tmp_path):
    processes.check_death_of_one_is_noticed(trainer, tmp_path)


def test_torchrun_restarts_after_a_kill(trainer, train_argv, tmp_path):
    argv = [*train_argv, "--method", "smoe_dropout"]
    processes.check_torchrun_restarts(trainer, "transformer_xl.train", argv, tmp_path)
