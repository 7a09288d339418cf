"""Whether fastmoe can run here. Importing this does not import ``fmoe``; :mod:`smoe.fastmoe` does."""

from __future__ import annotations

from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import find_spec

import torch


def fastmoe_obstacle() -> str | None:
    """Why fastmoe cannot run here, in a few words; None if it can.

    Asked before anything is called: without a CUDA device the first call of a compiled kernel ends the process, and no
    ``except`` catches that. An ``fmoe_cuda`` written in Python raises ordinary exceptions, so it may be tried.
    """
    missing = [name for name in ("fmoe", "fmoe_cuda") if _spec(name) is None]
    if missing:
        return f"there is no package {missing[0]}"
    if kernels_are_compiled() and not torch.cuda.is_available():
        return "its kernels need a CUDA device, and there is none"
    try:
        from fmoe import layers
    except (ImportError, OSError) as error:
        return f"fmoe can't be imported ({' '.join(str(error).split())})"
    if getattr(layers, "fmoe_faster_schedule", False):
        return "FMOE_FASTER_SCHEDULE_ENABLE is set, and that schedule can't run fused experts"
    return None


def kernels_are_compiled() -> bool:
    """Whether the ``fmoe_cuda`` that would be imported is the CUDA extension, not a module written in Python."""
    spec = _spec("fmoe_cuda")
    return spec is not None and isinstance(spec.loader, ExtensionFileLoader)


def _spec(name: str) -> ModuleSpec | None:
    try:
        return find_spec(name)
    except ValueError:  # a module that was made by hand has no spec
        return None
