"""A double of the package ``fmoe``: how FMoE calls its gate and its experts, and nothing else.

It has the interface that ``smoe.fastmoe`` uses (one rank, fused experts) and refuses what the CUDA kernels would read
wrongly: tensors that are not contiguous, indices that are not int64, different dtypes, a gate with another k than the
layer. So the code of ``smoe.fastmoe`` is tested everywhere; that fmoe has this interface, only tests with fmoe show.
"""

import torch
from torch import nn

from . import layers  # noqa: F401
from .linear import check_contiguous


class FMoE(nn.Module):
    def __init__(self, num_expert=32, d_model=1024, world_size=1, moe_group=None, top_k=2, gate=None, expert=None):
        super().__init__()
        assert expert is None and world_size == 1
        self.num_expert, self.d_model, self.world_size, self.moe_group = num_expert, d_model, world_size, moe_group
        self.top_k = top_k
        self.gate = gate(d_model, num_expert, world_size, top_k)

    def forward(self, x):
        indices, scores = self.gate(x)
        check_contiguous(indices=indices, scores=scores)
        assert indices.dtype == torch.int64 and scores.dtype == x.dtype
        assert indices.shape == scores.shape == (x.shape[0], self.top_k) and x.shape[0] > 0
        assert self.gate.top_k == self.top_k and int(indices.max()) < self.num_expert
        flat = indices.view(-1)
        order = flat.argsort(stable=True)[int((flat < 0).sum()) :]  # -1: a slot without an expert
        counts = torch.bincount(flat[order], minlength=self.num_expert)
        out = self.expert_fn(x[order // self.top_k], counts)
        assert out.dtype == x.dtype
        pairs = torch.zeros(flat.shape[0], x.shape[1], dtype=out.dtype).index_copy(0, order, out)
        return torch.bmm(scores.unsqueeze(1), pairs.view(-1, self.top_k, x.shape[1])).squeeze(1)
