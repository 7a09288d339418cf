"""What other libraries put around a layer's router and experts: PEFT's adapters and accelerate's offloading.

PEFT replaces ``layer.experts`` or ``layer.router`` by a module that holds it. ``ParamWrapper`` (``target_parameters``)
has none of its attributes; ``ModulesToSaveWrapper`` (``modules_to_save``) holds the original and one trained copy per
adapter. Such a module can be called like the one it holds, but attributes must be read and set on the module inside.
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def unwrap(module: nn.Module, kind: type[M]) -> list[M]:
    """``module`` itself, or if it is a wrapper, the modules of class ``kind`` that it holds, the original first."""
    if isinstance(module, kind):
        return [module]
    return [inner for inner in module.modules() if isinstance(inner, kind)] or [module]


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate has moved the weights of ``module`` away until its next forward pass (``cpu_offload``)."""
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return hasattr(module, "_hf_hook") and any(tensor.is_meta for tensor in tensors)
