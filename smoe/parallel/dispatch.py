"""Expert-parallel dispatch: a token is sent once to each rank that holds experts it chose, and one sum comes back.

In one pass of a layer each rank sends these messages to the other ranks of its expert-parallel group:

sizes      3 int64: the number of rows that will follow, k, and the bytes of a row
forward    a row per (token, rank) pair: x, and the choices on that rank (per slot a float32 weight, an int16 expert)
output     a row per pair: the weighted sum of that rank's experts

and in the backward pass

gradient   a row per pair: the gradient of the output
input      a row per pair: the gradient of x and, if the router learns from them, of the weights

A rank computes its own tokens together with the received rows, in one call. A row has min(k, N / E) slots, the most
choices that a token can have on one rank; unused slots hold expert -1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..router import PartialRouting, Routing
from ..uncompiled import uncompiled
from .agreement import raise_disagreement
from .groups import ParallelGroups
from .plan import DispatchPlan, make_plan

LocalExperts = Callable[[Tensor, Routing], Tensor]
"""Computes rows ``x (R, d)`` with this rank's experts, given the rows' routing over them -> ``y (R, d)``."""


class Sent(NamedTuple):
    """One message: its name (see this module), its rows, the bytes of token vectors in it, and all its bytes.

    The rows and bytes are those that this rank sends to all other ranks together.
    """

    message: str
    rows: int
    vectors: int
    bytes: int


class Dispatch:
    """Sends the tokens of one layer to the ranks of their experts, and brings back the outputs.

    Args:
        num_experts: N, the experts of the whole layer.
        groups: the ranks that share them.
    """

    def __init__(self, num_experts: int, groups: ParallelGroups) -> None:
        self.num_experts, self.groups = num_experts, groups
        self.watchers: list[list[Sent]] = []
        self.unsynced = False  # whether a backward pass has run since the last sync_expert_gradients

    @uncompiled  # the number of received rows is only known at run time
    def __call__(self, x: Tensor, routing: Routing, local_experts: LocalExperts) -> Tensor:
        """x (T, d) and its routing over all N experts -> y (T, d). All ranks of the group call it together."""
        # Under autocast the experts compute in its dtype anyway, and it halves the bytes to send.
        device = x.device.type
        x = x.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype)
        groups, k = self.groups, routing.indices.shape[1]
        num_local = self.num_experts // groups.expert_parallel
        plan = make_plan(routing.indices, num_local, groups.expert_parallel, groups.ep_rank)
        exchange = Exchange(self, plan, x.shape[0], Row.of(x, min(k, num_local)), k)
        local_indices = routing.indices.remainder(num_local)
        rows, weights, indices = _Forward.apply(x, routing.weights, local_indices, exchange)
        kind = PartialRouting if routing.absent or k < self.num_experts else Routing
        y = local_experts(rows, kind(indices, weights, None))
        return _Output.apply(y, exchange)


class Row(NamedTuple):
    """The layout of a row of the forward message, in bytes: x, weights, experts, padding to a multiple of 8."""

    width: int
    itemsize: int
    slots: int

    @classmethod
    def of(cls, x: Tensor, slots: int) -> Row:
        return cls(x.shape[1], x.element_size(), slots)

    @property
    def vector(self) -> int:
        return self.width * self.itemsize

    @property
    def weights_at(self) -> int:
        return -(-self.vector // 4) * 4

    @property
    def indices_at(self) -> int:
        return self.weights_at + 4 * self.slots

    @property
    def size(self) -> int:
        return -(-(self.indices_at + 2 * self.slots) // 8) * 8

    @property
    def gradient_size(self) -> int:
        """The bytes of a row of the input message: the gradients of x and of the weights."""
        return -(-self.indices_at // 8) * 8

    def x(self, buffer: Tensor, dtype: torch.dtype) -> Tensor:
        return buffer[:, : self.vector].view(dtype)

    def weights(self, buffer: Tensor) -> Tensor:
        return buffer[:, self.weights_at : self.indices_at].view(torch.float32)

    def indices(self, buffer: Tensor) -> Tensor:
        return buffer[:, self.indices_at : self.indices_at + 2 * self.slots].view(torch.int16)


class Exchange:
    """One pass of one layer: exchanges the numbers of rows, then rows in both directions.

    Attributes:
        num_own: pairs of this rank with itself, which are not sent; the first ones of the plan.
        num_sent, num_received: rows that this rank sends to others and receives from them.
    """

    def __init__(self, dispatch: Dispatch, plan: DispatchPlan, num_tokens: int, row: Row, k: int) -> None:
        self.dispatch, self.plan, self.num_tokens, self.row = dispatch, plan, num_tokens, row
        groups = dispatch.groups
        sizes = torch.stack([plan.rows, torch.full_like(plan.rows, k), torch.full_like(plan.rows, row.size)], 1)
        received = torch.empty_like(sizes)
        dist.all_to_all_single(received, sizes, group=groups.ep_group)
        self._record("sizes", groups.expert_parallel - 1, 0, sizes[0].numel() * sizes.element_size())
        send_counts, by_rank = plan.rows.tolist(), received.tolist()
        # Rows of a rank with another k or dtype would be misread.
        first = groups.rank - groups.ep_rank
        raise_disagreement(
            [{"top_k": k, "the size of a row in bytes (of d_model, dtype and k)": size} for _, k, size in by_rank],
            range(first, first + groups.expert_parallel),
        )
        self.send_counts, self.receive_counts = send_counts, [rows for rows, _, _ in by_rank]
        self.num_own = self.send_counts[groups.ep_rank]
        self.send_counts[groups.ep_rank] = self.receive_counts[groups.ep_rank] = 0
        self.num_sent, self.num_received = sum(self.send_counts), sum(self.receive_counts)

    def send(self, message: str, rows: Tensor, out: Tensor, vector: int) -> None:
        """Tokens to their experts: rows (num_sent, ...) -> out (num_received, ...)."""
        self._all_to_all(message, rows, out, self.send_counts, self.receive_counts, vector)

    def send_back(self, message: str, rows: Tensor, out: Tensor, vector: int) -> None:
        """The opposite direction: rows (num_received, ...) -> out (num_sent, ...)."""
        self._all_to_all(message, rows, out, self.receive_counts, self.send_counts, vector)

    def _all_to_all(
        self, message: str, rows: Tensor, out: Tensor, send: list[int], receive: list[int], vector: int
    ) -> None:
        assert rows.is_contiguous() and out.is_contiguous()
        dist.all_to_all_single(out, rows, receive, send, group=self.dispatch.groups.ep_group)
        self._record(message, rows.shape[0], vector, rows.stride(0) * rows.element_size())

    def _record(self, message: str, rows: int, vector: int, size: int) -> None:
        for watcher in self.dispatch.watchers:
            watcher.append(Sent(message, rows, rows * vector, rows * size))

    def sum_pairs(self, pairs: Tensor) -> Tensor:
        """Pairs (P, d) in the plan's order -> (T, d), their sums per token, in float32 and rounded once."""
        if self.num_tokens == 0:
            return pairs.new_empty(0, pairs.shape[1])
        if pairs.shape[0] == 0:
            return pairs.new_zeros(self.num_tokens, pairs.shape[1])
        return F.embedding_bag(self.plan.bags, pairs, self.plan.starts, mode="sum")


class _Forward(torch.autograd.Function):
    """x (T, d), weights (T, k), local expert indices (T, k) -> rows (R, d), weights and indices (R, slots)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, indices: Tensor, exchange: Exchange) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.num_choices = exchange, weights.shape[1]
        plan, row, own = exchange.plan, exchange.row, exchange.num_own
        tokens, columns = plan.tokens, plan.columns
        unused = columns < 0
        source = tokens.unsqueeze(1), columns.clamp_min(0)
        pair_weights = weights.float()[source].masked_fill_(unused, 0)
        pair_indices = indices[source].masked_fill_(unused, -1)
        sent = x.new_empty(exchange.num_sent, row.size, dtype=torch.uint8)
        row.x(sent, x.dtype).copy_(x[tokens[own:]])
        row.weights(sent).copy_(pair_weights[own:])
        row.indices(sent).copy_(pair_indices[own:])
        received = x.new_empty(exchange.num_received, row.size, dtype=torch.uint8)
        exchange.send("forward", sent, received, row.vector)
        rows = torch.cat([x[tokens[:own]], row.x(received, x.dtype)])
        row_weights = torch.cat([pair_weights[:own], row.weights(received)])
        row_indices = torch.cat([pair_indices[:own], row.indices(received).to(pair_indices.dtype)])
        ctx.mark_non_differentiable(row_indices)
        ctx.weights_dtype = weights.dtype
        return rows, row_weights, row_indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        exchange = ctx.exchange
        plan, row, own = exchange.plan, exchange.row, exchange.num_own
        exchange.dispatch.unsynced = True
        pairs = grad_rows.new_empty(own + exchange.num_sent, row.width)
        pairs[:own] = grad_rows[:own]
        if not ctx.needs_input_grad[1]:
            exchange.send_back("input", grad_rows[own:].contiguous(), pairs[own:], row.vector)
            return exchange.sum_pairs(pairs), None, None, None
        sent = grad_rows.new_empty(exchange.num_received, row.gradient_size, dtype=torch.uint8)
        row.x(sent, grad_rows.dtype).copy_(grad_rows[own:])
        row.weights(sent).copy_(grad_weights[own:])
        received = grad_rows.new_empty(exchange.num_sent, row.gradient_size, dtype=torch.uint8)
        exchange.send_back("input", sent, received, row.vector)
        pairs[own:] = row.x(received, grad_rows.dtype)
        pair_weights = torch.cat([grad_weights[:own], row.weights(received)])
        # One more column takes the gradients of unused slots.
        grad = grad_weights.new_zeros(exchange.num_tokens, ctx.num_choices + 1)
        grad[plan.tokens.unsqueeze(1), plan.columns.remainder(ctx.num_choices + 1)] = pair_weights
        return exchange.sum_pairs(pairs), grad[:, :-1].to(ctx.weights_dtype), None, None


class _Output(torch.autograd.Function):
    """Outputs (R, d) of the local experts -> y (T, d), the sum over the ranks of each token."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange, own = exchange, exchange.num_own
        pairs = rows.new_empty(own + exchange.num_sent, rows.shape[1])
        pairs[:own] = rows[:own]
        exchange.send_back("output", rows[own:].contiguous(), pairs[own:], rows.shape[1] * rows.element_size())
        return exchange.sum_pairs(pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        tokens, own = exchange.plan.tokens, exchange.num_own
        exchange.dispatch.unsynced = True
        grad = grad_y.new_empty(own + exchange.num_received, grad_y.shape[1])
        grad[:own] = grad_y[tokens[:own]]
        vector = grad_y.shape[1] * grad_y.element_size()
        exchange.send("gradient", grad_y[tokens[own:]], grad[own:], vector)
        return grad, None
