"""The trainer on several processes: what one process does, whatever goes wrong said by all, no loss with a worker."""

import shutil

import processes
import pytest
from commands import free_port, rank_starter
from runs import assert_close_runs, assert_one_line
from torch.distributed import TCPStore

pytestmark = pytest.mark.distributed


@pytest.fixture
def trainer(start_ranks, train_argv):
    return rank_starter(start_ranks, "transformer_xl.train", [*train_argv, "--method", "smoe_dropout"])


def test_twenty_steps_are_those_of_one_process(trainer, tmp_path):
    processes.check_equals_one_process(trainer, tmp_path, [(2, 2, False), (4, 2, False), (4, 2, True)])


@pytest.mark.slow
def test_twenty_steps_with_data_or_experts_alone_spread(trainer, tmp_path):
    processes.check_equals_one_process(trainer, tmp_path, [(2, 1, False), (4, 1, False), (4, 4, False), (2, 1, True)])


def test_a_checkpoint_of_four_processes_goes_on_at_one_two_and_four(trainer, tmp_path):
    processes.check_resumes_at_any_number(trainer, tmp_path, fsdp=False)


@pytest.mark.parametrize(
    ("flags", "own", "words"),
    [
        ([], ["--seed", 2], ["seed is 1 on rank 0, 2 on rank 1"]),
        ([], ["--k_max", 9], ["k_max is None on rank 0, 9 on rank 1"]),
        ([], ["--k_max", 17], ["k_max is 17", "num_experts = 16"]),
        ([], ["--data", "/nowhere"], ["/nowhere", "prepare.py"]),
        (["--batch_size", 3], [], ["batch_size is 3", "processes, 2"]),
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
    other = tmp_path / "other"
    shutil.copytree(data_dir, other)
    meta = other / "meta.json"
    meta.write_text(meta.read_text().replace('"sha256": "', '"sha256": "0', 1))
    processes.check_disagreement(trainer, tmp_path, [], ["--data", other], ["data is", "on rank 0", "on rank 1"])


def test_a_process_that_never_comes_is_not_waited_for_longer_than_allowed(start, train_argv, tmp_path):
    env = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    argv = [*train_argv, "--method", "smoe_dropout", "--run_dir", tmp_path / "run", "--process_timeout", 2]
    assert_one_line(start("transformer_xl.train", *argv, env=env), 1, "lost contact with another process")


def test_fsdp_with_a_single_process_is_one_line(train, tmp_path):
    assert_one_line(train("smoe", tmp_path / "run", "--fsdp"), 2, "fsdp", "1", "torchrun")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["thor", "dense_concrete_dropout"])
def test_two_passes_and_penalties_with_fsdp(method, start_ranks, train_argv, tmp_path):
    """THOR's two passes in one backward, and a penalty that reads sharded weights, are those of DDP."""
    runs = {}
    for fsdp in (False, True):
        runs[fsdp] = tmp_path / f"{fsdp}"
        argv = [*train_argv, "--method", method, "--run_dir", runs[fsdp], "--fsdp", fsdp, "--log_interval", 1]
        processes.finish(start_ranks(2, "transformer_xl.train", *argv, "--sweep", 16))
    assert_close_runs(runs[False], runs[True])


def test_a_signal_to_one_stops_all(trainer, tmp_path):
    processes.check_signal_to_one_stops_all(trainer, tmp_path)


def test_the_death_of_one_is_noticed(trainer, tmp_path):
    processes.check_death_of_one_is_noticed(trainer, tmp_path)


def test_what_one_machine_restarts_all_resume(start_ranks, train_argv, tmp_path):
    """torchrun counts its restarts on each machine for itself."""
    argv = [*train_argv, "--method", "smoe", "--run_dir", tmp_path / "run", "--steps", 2, "--sweep", 16]
    processes.finish(start_ranks(2, "transformer_xl.train", *argv))
    again = start_ranks(2, "transformer_xl.train", *argv, env={1: {"TORCHELASTIC_RESTART_COUNT": "1"}})
    processes.finish(again)
    assert "is finished" in again[0].out


def test_a_restart_does_not_go_on_with_a_run_that_its_job_has_not_opened(start_ranks, train_argv, tmp_path):
    """What was refused without --resume stays refused when torchrun starts it again."""
    argv = [*train_argv, "--method", "smoe", "--run_dir", tmp_path / "run", "--steps", 2, "--sweep", 16]
    processes.finish(start_ranks(1, "transformer_xl.train", *argv))
    agents = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(agents.port)}
    for restarts in "01":
        count = {"TORCHELASTIC_RESTART_COUNT": restarts}
        for command in start_ranks(2, "transformer_xl.train", *argv, env=dict.fromkeys(range(2), env | count)):
            assert_one_line(command, 2, "already holds a run", "--resume")


def test_torchrun_restarts_after_a_kill(trainer, train_argv, tmp_path):
    argv = [*train_argv, "--method", "smoe_dropout"]
    processes.check_torchrun_restarts(trainer, "transformer_xl.train", argv, tmp_path)
