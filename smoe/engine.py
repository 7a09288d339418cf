"""Which engine computes the experts: PyTorch alone (``smoe.compute``) or fastmoe's FMoE (``smoe.fastmoe``)."""

from __future__ import annotations

from typing import Literal, get_args

import torch

Engine = Literal["auto", "torch", "fastmoe"]
ENGINES: tuple[str, ...] = get_args(Engine)


def resolve_engine(engine: str, compute: str = "auto") -> str:
    """The engine that this machine can run: ``auto`` becomes ``torch`` unless it has fmoe and a CUDA device.

    Args:
        compute: the layer's ``compute``. If it names a path, PyTorch computes the experts.

    Raises:
        ValueError: the engine is unknown; or it is ``fastmoe`` and fmoe cannot run here, or ``compute`` names a path.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; it must be one of {', '.join(ENGINES)}")
    if engine == "torch" or (engine == "auto" and (compute != "auto" or not torch.cuda.is_available())):
        return "torch"
    if compute != "auto":
        raise ValueError(f"compute is {compute!r}; with engine 'fastmoe' it must be 'auto', since FMoE has no paths")
    from .fastmoe_available import fastmoe_obstacle

    obstacle = fastmoe_obstacle()
    if engine == "auto":
        return "torch" if obstacle else "auto"
    if obstacle:
        raise ValueError(
            f"engine is 'fastmoe', but {obstacle}; docs/fastmoe.md says how to install it, engine 'torch' needs nothing"
        )
    return engine
