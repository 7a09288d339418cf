"""``import smoe`` needs torch alone and costs next to nothing on top of it."""

import json
import statistics
import subprocess
import sys

import pytest

# Importing torch takes seconds, so one process does it and forks: every child imports smoe for the first time.
CODE = """
import json, os, sys, time
import torch
for _ in range(5):
    child = os.fork()
    if not child:
        before, start = set(sys.modules), time.process_time()
        import smoe
        seconds = time.process_time() - start
        new = set(sys.modules) - before
        print(json.dumps({"seconds": seconds, "new": sorted(new)}), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_import_needs_torch_alone_and_no_time():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(runs) == 5
    packages = {name.partition(".")[0] for name in runs[0]["new"]}
    foreign = packages - {"smoe", "torch"} - set(sys.stdlib_module_names)
    assert not foreign, f"import smoe also imports {sorted(foreign)}"
    assert "torch._dynamo" not in runs[0]["new"], "import smoe also imports torch's compiler, which takes a second"
    assert statistics.median(run["seconds"] for run in runs) < 0.3


def test_importing_smoe_needs_no_transformers():
    code = "import sys, smoe; assert callable(smoe.modulize); assert 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
