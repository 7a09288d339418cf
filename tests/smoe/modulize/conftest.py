"""Transformers without its warnings and bars, and registered MLPs that a test leaves as they were."""

import pytest
import transformers

from smoe.modulize import register

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture
def registry():
    before = dict(register._registered)
    yield
    register._registered.clear()
    register._registered.update(before)
