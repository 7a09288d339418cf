"""A signal asks to stop; a second one, later, ends the process."""

from __future__ import annotations

import os
import signal

import pytest
from toy_task import toy, toy_config

from smoe.train.stop import StopRequest


@pytest.fixture
def processes(tmp_path):
    return toy(toy_config(tmp_path))[1]


@pytest.fixture(autouse=True)
def handlers():
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield previous
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop(number, processes, handlers):
    stop = StopRequest()
    assert not stop.requested(processes)
    os.kill(os.getpid(), number)
    assert stop.requested(processes) and stop.requested(processes)
    os.kill(os.getpid(), number)  # at once: the same wish, as when the whole group is asked
    assert stop.requested(processes)
    stop.release()
    assert {n: signal.getsignal(n) for n in handlers} == handlers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_wish_ends_the_process(number, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("smoe.train.stop.time.monotonic", lambda: now[0])
    child = os.fork()
    if child == 0:
        try:
            StopRequest()
            os.kill(os.getpid(), number)
            now[0] = 5.0
            os.kill(os.getpid(), number)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == number
