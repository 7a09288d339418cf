"""Run a checkout of the published Transformer-XL (github.com/kimiyoung/transformer-xl) on a current PyTorch.

The code is imported from the user's checkout; none of it is here. Two things in it no longer work: it reads the CUDA
version even on machines without CUDA, and it masks with bytes where PyTorch now needs booleans.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn


def build_reference(
    checkout: str,
    *,
    vocab_size: int,
    num_layers: int,
    d_model: int,
    num_heads: int,
    d_head: int,
    d_hidden: int,
    dropout: float,
    length: int,
    memory_length: int,
) -> nn.Module:
    """Build the reference `MemTransformerLM` as its enwik8 script does; weights are left as constructed.

    Raises ValueError if `checkout` has no pytorch/mem_transformer.py.
    """
    folder = Path(checkout) / "pytorch"
    if not (folder / "mem_transformer.py").is_file():
        raise ValueError(f"{checkout} is no checkout of kimiyoung/transformer-xl: it has no pytorch/mem_transformer.py")
    cuda_version, torch.version.cuda = torch.version.cuda, torch.version.cuda or "12.0"  # any version will do
    sys.path[:0] = [str(folder), str(folder / "utils")]
    try:
        module = importlib.import_module("mem_transformer")
    finally:
        del sys.path[:2]
        torch.version.cuda = cuda_version
    return module.MemTransformerLM(
        vocab_size,
        num_layers,
        num_heads,
        d_model,
        d_head,
        d_hidden,
        dropout,
        0.0,
        tie_weight=True,
        d_embed=d_model,
        tgt_len=length,
        ext_len=0,
        mem_len=memory_length,
        attn_type=0,
    )


def run_reference(model: nn.Module, ids: Tensor, targets: Tensor, *memories: Tensor) -> list[Tensor]:
    """Forward: `ids` and `targets` (T, B) -> [nll (T, B) in nats, then num_layers + 1 memories (M, B, d)]."""
    with _byte_masks_as_bool():
        return model(ids, targets, *memories)


@contextmanager
def _byte_masks_as_bool() -> Iterator[None]:
    original = torch.Tensor.byte
    torch.Tensor.byte = torch.Tensor.bool
    try:
        yield
    finally:
        torch.Tensor.byte = original
