"""Code that torch.compile must leave out of its graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P, R = ParamSpec("P"), TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, which runs as it is within a compiled model too; the graph breaks there.

    Unlike ``torch.compiler.disable`` it imports the compiler, which takes seconds, only when a model is compiled.
    """
    outside_the_graph = torch._disable_dynamo(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return (outside_the_graph if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return call
