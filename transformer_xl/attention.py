"""Multi-head attention with relative positions (Dai et al. 2019, section 3.3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def relative_distances(query_length: int, key_length: int, device: torch.device | None = None) -> Tensor:
    """Distances query - key that attention needs, as float32 `(key_length + 1,)`: key_length - 1, ..., 1, 0, -1.

    The last one, -1, is never attended to: it widens every row of the position scores by one, which is what
    lets `relative_shift` be a view.
    """
    assert key_length >= query_length >= 1
    return torch.arange(key_length - 1, -2, -1, device=device, dtype=torch.float32)


def sinusoids(distances: Tensor, d_model: int) -> Tensor:
    """Sinusoidal encoding of `distances (P,)` -> `(P, d_model)`: all sines, then all cosines."""
    frequencies = 10000.0 ** (-torch.arange(0, d_model, 2, device=distances.device, dtype=torch.float32) / d_model)
    angles = distances[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def relative_shift(scores: Tensor, query_length: int, key_length: int) -> Tensor:
    """Turn scores by distance into scores by key, without copying.

    `scores (..., T, S + 1)`, contiguous, has in column p the score of distance S - 1 - p. Query i stands at position
    S - T + i, so key j is found in column j + T - 1 - i: one column less for each further row. In memory the element
    is i * (S + 1) + j + T - 1 - i = i * S + j + (T - 1), that is, a plain `(T, S)` block which starts at T - 1.

    Returns `(..., T, S)`, a view. Where key j lies after query i (j > S - T + i) the value is one of another
    row and means nothing: mask it.
    """
    batch_shape = scores.shape[:-2]
    flat = scores.view(*batch_shape, query_length * (key_length + 1))
    return flat.narrow(-1, query_length - 1, query_length * key_length).view(*batch_shape, query_length, key_length)


def causal_mask(query_length: int, key_length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`(T, S)` to be added to scores: -inf where the key comes after the query, else 0."""
    mask = torch.full((query_length, key_length), float("-inf"), dtype=dtype, device=device)
    return mask.triu_(key_length - query_length + 1)


class RelativeAttention(nn.Module):
    """Causal attention of T tokens to S = M + T keys, of which the first M come from memory.

    Score of query i and key j (Dai et al. 2019, section 3.3): `((q_i + u) . k_j + (q_i + v) . r_(i-j)) / sqrt(d_head)`.
    Heads go first and batches second, `(H, B, T, D)`, so that the position keys r, which all sequences share, meet
    the queries of the whole batch in one matrix product per head.
    """

    def __init__(self, d_model: int, num_heads: int, d_head: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.d_head = d_head
        self.dropout = dropout
        inner = num_heads * d_head
        # Memory needs keys and values but no queries.
        self.query = nn.Linear(d_model, inner, bias=False)
        self.key_value = nn.Linear(d_model, 2 * inner, bias=False)
        self.position = nn.Linear(d_model, inner, bias=False)
        self.output = nn.Linear(inner, d_model, bias=False)

    def forward(
        self, x: Tensor, context: Tensor, positions: Tensor, content_bias: Tensor, position_bias: Tensor
    ) -> Tensor:
        """Attend from `x (B, T, d)` to `context (B, S, d)`, whose last T rows are x.

        `positions (S + 1, d)` encodes `relative_distances(T, S)`; `content_bias` and `position_bias` (H, D) are
        u and v of the paper. Returns `(B, T, d)`.
        """
        (batch, t, _), s = x.shape, context.shape[1]
        heads, d_head = self.num_heads, self.d_head

        q = self.query(x).view(batch, t, heads, d_head).permute(2, 0, 1, 3)  # H B T D
        kv = self.key_value(context).view(batch, s, 2, heads, d_head).permute(2, 3, 0, 1, 4)  # 2 H B S D
        k, v = kv.reshape(2, heads * batch, s, d_head).unbind(0)
        r = self.position(positions).view(s + 1, heads, d_head).permute(1, 2, 0)  # H D S+1

        scale = d_head**-0.5
        bias_shape = (heads, 1, 1, d_head)
        q_content = torch.add((content_bias * scale).view(bias_shape).to(q.dtype), q, alpha=scale)
        q_position = torch.add((position_bias * scale).view(bias_shape).to(q.dtype), q, alpha=scale)

        by_distance = torch.bmm(q_position.reshape(heads, batch * t, d_head), r).view(heads * batch, t, s + 1)
        q_content = q_content.reshape(heads * batch, t, d_head)
        scores = torch.baddbmm(relative_shift(by_distance, t, s), q_content, k.transpose(1, 2))
        # Added rather than filled in: softmax already gives masked scores no gradient, so backward has nothing to do.
        scores += causal_mask(t, s, scores.dtype, scores.device)
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        mixed = torch.bmm(weights, v).view(heads, batch, t, d_head)
        return self.output(mixed.permute(1, 2, 0, 3).reshape(batch, t, heads * d_head))
