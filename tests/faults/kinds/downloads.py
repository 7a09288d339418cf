"""Downloads that are cut off, or bring something else."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import mirror
from faults.kinds.kind import ROOT, Random, in_turn, kind
from faults.rig import DEADLINE, Lost, Rig, TinyTask, Unclear

from data.errors import DownloadError
from data.fetch import Url, first_that_works
from data.folder import scratch

CONTENT = bytes(range(256)) * 400
ANSWERS = ("cut", "web page", "nothing", "an error", "killed half-way")


@kind("download", "a download cut off, a web page, nothing, a kill half-way", 4, ("language_model",))
def _(rig: Rig, task: TinyTask, random: Random) -> None:
    out, (how,) = rig.folder() / "out", in_turn("download", ANSWERS)
    cut = random.randrange(1, len(CONTENT))

    def answer(request) -> None:
        request.close_connection = True
        bad = request.path == "/bad"
        if bad and how == "nothing":
            return
        request.send_response(503 if bad and how == "an error" else 200)
        if not bad or how != "web page":
            request.send_header("Content-Length", str(len(CONTENT)))
        request.end_headers()
        request.wfile.write(b"<html>Sign in</html>" if bad and how == "web page" else CONTENT[:cut] if bad else CONTENT)
        request.wfile.flush()
        if bad and how == "killed half-way":
            time.sleep(2)

    def take(path: Path) -> bytes:
        return path.read_bytes()

    with mirror.serve(answer) as url:
        bad, good = (Url(f"{url}/{name}", len(CONTENT), timeout=20) for name in ("bad", "good"))
        if how == "killed half-way":
            code = "from pathlib import Path; from data.fetch import *; from data.folder import scratch\n"
            code += f"with scratch(Path({str(out)!r})) as own: first_that_works([{bad!r}], Path.read_bytes, own)"
            child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
            deadline = time.monotonic() + DEADLINE
            while not (list(out.glob("*/*/download")) if out.exists() else []) and time.monotonic() < deadline:
                time.sleep(0.01)
            child.kill()
            child.wait()
        else:
            try:
                with scratch(out) as own:
                    first_that_works([bad], take, own)
                raise Lost(f"{how}: it was taken for whole")
            except DownloadError as error:
                if "\n" in str(error):
                    raise Unclear(str(error)) from None
        with scratch(out) as own:  # as data sets are fetched
            content, name = first_that_works([bad, good] if how != "killed half-way" else [good], take, own)
        if content != CONTENT or name != good.url or list(out.iterdir()):
            raise Lost(f"{how}: {len(content)} bytes from {name}; left {list(out.iterdir())}")
