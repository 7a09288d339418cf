"""Which engine computes the experts: PyTorch alone (``smoe.compute``), or fastmoe's FMoE (``smoe.fastmoe``)."""

from __future__ import annotations

from importlib.machinery import ExtensionFileLoader
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .compute import PATHS
from .compute.choose import Compute

if TYPE_CHECKING:
    from .fastmoe import FastMoE

ENGINES = ("auto", "torch", "fastmoe")
_HELP = "docs/fastmoe.md says how to install it, engine='torch' needs nothing"


def resolve_engine(engine: str, compute: str = "auto") -> str:
    """What ``engine`` comes to here: ``auto`` is ``torch`` unless there are fmoe and a CUDA device.

    ``compute`` is SMoE's: with the name of a path PyTorch computes.

    Raises:
        ValueError: the engine is unknown; or it is ``fastmoe`` and fmoe can't run here, or ``compute`` names a path.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; it must be one of {', '.join(ENGINES)}")
    if engine == "torch":
        return engine
    if engine == "auto":
        found = compute == "auto" and torch.cuda.is_available() and fastmoe_obstacle() is None
        return "auto" if found else "torch"
    if compute != "auto":
        raise ValueError(f"compute is {compute!r}; with engine 'fastmoe' it must be 'auto': fmoe has its own ways")
    if obstacle := fastmoe_obstacle():
        raise ValueError(f"engine is 'fastmoe', but {obstacle}; {_HELP}")
    return engine


def make_fastmoe(engine: str, num_experts: int, d_model: int) -> FastMoE | None:
    """The FMoE layer that a resolved ``engine`` needs."""
    if engine == "torch":
        return None
    from .fastmoe import FastMoE

    return FastMoE(num_experts, d_model)


def replace_grouped(path: Compute, fmoe: FastMoE | None, x: Tensor) -> Compute:
    """The path that ``auto`` takes for x: what ``smoe.compute`` chose, or ``fmoe`` in place of ``grouped`` on CUDA.

    Both compute one expert after the other, FMoE on several streams. Where another path was chosen FMoE would lose: it
    copies every row k times, waits for the device several times a pass, and can't be compiled.
    """
    if fmoe is None or x.device.type != "cuda" or torch.compiler.is_compiling():
        return path
    return fmoe if path is PATHS["grouped"] else path


def fastmoe_obstacle() -> str | None:
    """What keeps fastmoe's layers from running here, in a few words; None if nothing does.

    Asked beforehand, since without a CUDA device the first call of a compiled kernel ends the process, and no
    ``except`` catches that. An ``fmoe_cuda`` that is written in Python raises like all Python, so it may try.
    """
    missing = [name for name in ("fmoe", "fmoe_cuda") if _spec(name) is None]
    if missing:
        return f"there is no package {missing[0]}"
    if kernels_are_compiled() and not torch.cuda.is_available():
        return "its kernels need a CUDA device, and there is none"
    try:
        import fmoe  # noqa: F401
    except (ImportError, OSError) as error:
        return f"fmoe can't be imported ({' '.join(str(error).split())})"
    from fmoe import layers

    if getattr(layers, "fmoe_faster_schedule", False):
        return "FMOE_FASTER_SCHEDULE_ENABLE is set, and that schedule can't run fused experts"
    return None


def kernels_are_compiled() -> bool:
    """Whether the ``fmoe_cuda`` that would be imported is the CUDA extension, not a module written in Python."""
    spec = _spec("fmoe_cuda")
    return spec is not None and isinstance(spec.loader, ExtensionFileLoader)


def _spec(name: str):  # noqa: ANN202 (importlib's ModuleSpec)
    try:
        return find_spec(name)
    except ValueError:  # a module somebody made by hand has none
        return None
