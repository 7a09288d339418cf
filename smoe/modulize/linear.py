"""Linear layers: ``nn.Linear`` and Hugging Face's ``Conv1D``, whose weight is transposed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def is_linear(module: nn.Module) -> bool:
    """Whether it computes ``x @ W + b`` and nothing else: ``nn.Linear``, or Hugging Face's ``Conv1D``.

    Subclasses count if they leave ``forward`` alone or compute the same in their own words (Falcon's). Quantised and
    parametrised layers and LoRA don't count.
    """
    if "forward" in vars(module) or hasattr(module, "parametrizations"):
        return False
    if type(module).forward is nn.Linear.forward or is_transposed(module):
        return True
    own = dict(module.named_parameters())
    if not isinstance(module, nn.Linear) or not own.keys() <= {"weight", "bias"} or own["weight"].ndim != 2:
        return False
    with torch.no_grad():
        x = torch.linspace(-1, 1, module.in_features, device=module.weight.device).to(module.weight.dtype)
        try:
            return torch.allclose(module(x[None]), F.linear(x[None], module.weight, module.bias), rtol=1e-3, atol=1e-5)
        except Exception:  # it takes something else than a matrix of vectors, so it is another kind of layer
            return False


def is_like_linear(module: nn.Module) -> bool:
    """Whether it stands where a linear layer could, but is none of PyTorch's or computes something else.

    So do quantised and parametrised layers, and linear layers under an adapter (LoRA).
    """
    sizes = [getattr(module, name, None) for name in ("in_features", "out_features")]
    return all(isinstance(size, int) for size in sizes) and not is_linear(module)


def is_transposed(linear: nn.Module) -> bool:
    """Whether the weight is ``(in, out)``, as in ``Conv1D``, instead of ``nn.Linear``'s ``(out, in)``."""
    # By name: the library is not imported for a look.
    return type(linear).__name__ == "Conv1D" and type(linear).__module__.startswith("transformers.")


def widths(linear: nn.Module) -> tuple[int, int]:
    """(in_features, out_features)."""
    if is_transposed(linear):
        return tuple(linear.weight.shape)
    return tuple(linear.weight.shape[::-1]) if is_linear(linear) else (linear.in_features, linear.out_features)


def weight_of(linear: nn.Module) -> Tensor:
    """The weight as ``nn.Linear`` holds it, ``(out, in)``."""
    return linear.weight.t() if is_transposed(linear) else linear.weight


def set_weight(linear: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Gives ``linear`` a new weight ``(out, in)`` and, where it has one, bias ``(out,)``, of any size."""
    outputs, inputs = weight.shape
    if is_transposed(linear):
        weight, linear.nf, linear.nx = weight.t(), outputs, inputs
    else:
        linear.out_features, linear.in_features = outputs, inputs
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)
