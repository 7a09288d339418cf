"""Scripts whose `python -m module`, prepare.py and panel_runs.py start at once: the server of commands runs them, not a
new interpreter, which would import PyTorch anew, a matter of seconds. Everything else about a script is as a user calls
it.
"""

import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.resource_sharer import DupFd
from pathlib import Path

import pytest
from commands import SERVER

from smoe.errors import run_main

ROOT = Path(__file__).parents[1]

# What `python` is in these scripts. It imports next to nothing, and so takes milliseconds.
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
if sys.argv[1:2] != ["-m"] and not "".join(sys.argv[1:2]).endswith(("/panel_runs.py", "/prepare.py")):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = {{"argv": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}}
socket.send_fds(server, [json.dumps(request).encode() + b"\\n"], [0, 1, 2])
answers = server.makefile()
pid = int(answers.readline())
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
sys.exit(int(answers.readline()))
"""

# Bash reads it before the script (BASH_ENV). The script puts the environment's own python first on its PATH.
BASH_ENV = """source() {{
    builtin source "$@"
    PATH={folder}:$PATH
}}
"""


def _child(request: dict, descriptors: list[DupFd]) -> None:
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor.detach(), target)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["argv"][0] == "-m":
        sys.argv = request["argv"][1:]
        run_main(importlib.import_module(sys.argv[0]).main)
    else:
        sys.argv = request["argv"]
        sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
        runpy.run_path(sys.argv[0], run_name="__main__")


def _serve(connection: socket.socket) -> None:
    text, descriptors, *_ = socket.recv_fds(connection, 1 << 20, 3)
    while not text.endswith(b"\n"):
        text += connection.recv(1 << 20)
    process = SERVER.Process(target=_child, args=(json.loads(text), [DupFd(d) for d in descriptors]))
    process.start()
    for descriptor in descriptors:
        os.close(descriptor)
    connection.sendall(b"%d\n" % process.pid)
    process.join()
    connection.sendall(b"%d\n" % process.exitcode)
    connection.close()


@pytest.fixture(scope="session")
def quick_environment(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The environment in which a script's `python -m module` is quick."""
    folder = tmp_path_factory.mktemp("quick_python")
    address, python = folder / "socket", folder / "python"
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(address))
    server.listen()

    def accept() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:  # closed, below
                return
            threading.Thread(target=_serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    python.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    python.chmod(0o755)
    (folder / "bash_env").write_text(BASH_ENV.format(folder=folder))
    yield {"BASH_ENV": str(folder / "bash_env")}
    server.shutdown(socket.SHUT_RDWR)
    server.close()


@pytest.fixture
def quick_bash(quick_environment) -> Callable[..., subprocess.CompletedProcess]:
    """quick_bash(script, *argv, NAME=value) -> what it printed and its exit code; NAME is set in its environment."""

    def quick_bash(*argv: object, **more: str) -> subprocess.CompletedProcess:
        command, environment = ["bash", *map(str, argv)], os.environ | quick_environment | more
        return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)

    return quick_bash
