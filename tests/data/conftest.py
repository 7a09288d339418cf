"""A web server that plays a mirror, good or bad."""

import mirror
import pytest


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="session")
def serve():
    """`with serve(answer) as url`: a server whose GETs and HEADs `answer(request)` answers."""
    return mirror.serve
