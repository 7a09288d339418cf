"""Every benchmark can be imported, and the builders of a training step follow the trainers' configurations."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

import benchmarks
from benchmarks import step

PROGRAMS = sorted(path.stem for path in Path(benchmarks.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_imports(name):
    importlib.import_module(f"benchmarks.{name}")


@pytest.mark.parametrize("method", ["dense_dropout", "smoe_dropout"])
@pytest.mark.parametrize("build", ["transformer_xl", "bert", "roberta"])
def test_a_step_is_built_at_the_papers_size(build, method):
    """On shapes alone: its FLOPs grow with k, and its dropout rate is that of every dropout in the model."""
    with torch.device("meta"):
        if build == "transformer_xl":
            model, _, _, flops = step.transformer_xl(2, 16, method, 0.25, "meta")
        else:
            model, _, _, flops = step.masked_lm(build, method, 0.25, "meta")
        assert {module.p for module in model.modules() if "Dropout" in type(module).__name__} - {0.0} == {0.25}
        assert flops(None) > 0 if method == "dense_dropout" else flops(16) > flops(8) > 0
