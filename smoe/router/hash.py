"""The router that looks experts up by token id (Hash Layers, Roller et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Router, Score, generator
from .fixed import FixedBuffers
from .routing import Routing


class HashRouter(FixedBuffers, Router):
    """A fixed random table from *token id* to experts (Roller et al. 2021).

    The table holds a random order of all N experts per token id, of which the first k are used: the choice at k is part
    of the choice at k + 1. (The paper's release hashes the position in the batch instead.)

    Args:
        vocab_size: V, the number of token ids.
        seed: of the table ``(V, N)``; None draws from PyTorch's global generator.
    """

    needs_token_ids = True
    fixed = {"table": torch.int32}

    def __init__(
        self,
        vocab_size: int,
        num_experts: int,
        top_k: int,
        score: Score = "softmax_after_topk",
        *,
        seed: int | None = None,
    ) -> None:
        super().__init__(num_experts, top_k, score)
        if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 1:
            raise ValueError(f"vocab_size is {vocab_size!r}; a hash router needs the number of token ids (at least 1)")
        draw = torch.rand(vocab_size, num_experts, generator=generator(seed), dtype=torch.float32, device="cpu")
        self.register_buffer("table", draw.argsort(dim=-1).to(torch.int32))
        self.to(torch.empty(0).device)  # the default device, which may be meta

    def forward(self, x: Tensor, token_ids: Tensor | None = None, k_per_token: Tensor | None = None) -> Routing:
        if token_ids is None:
            raise ValueError("token_ids is missing; a hash router needs the id of every token: layer(x, token_ids=ids)")
        ids = token_ids.reshape(-1)
        if ids.shape[0] != x.shape[0]:
            raise ValueError(f"token_ids has {ids.shape[0]} ids; it must have one for each of the {x.shape[0]} tokens")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"token_ids is {ids.dtype}; a hash router needs whole numbers")
        try:
            # index_select refuses negative ids; [...] would count them from the end of the table.
            indices = self.table[:, : self.top_k].index_select(0, ids.long()).long()
        except IndexError:  # on a CPU; a CUDA device asserts by itself
            raise ValueError(
                f"token_ids has ids from {int(ids.min())} to {int(ids.max())}; they must be from 0 to "
                f"vocab_size - 1 = {self.table.shape[0] - 1}"
            ) from None
        return self._routing(None, indices, k_per_token)
