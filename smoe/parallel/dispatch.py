"""Tokens to the experts and back: once per destination rank, with their routing; one already-summed vector returns.

A pass of a layer sends, to each other rank of the group:

sizes      3 int64: how many rows will come, k, and the bytes of a row
forward    a row per (token, rank): x, and the token's choices there (weight float32, expert int16, per slot)
output     a row per (token, rank): the weighted sum of that rank's experts
and in backward the same way again
gradient   a row per (token, rank): the gradient of the output
input      a row per (token, rank): the gradients of x and, where the router learns from them, of the weights

Its own tokens a rank computes together with those that came, in one go. A token has as many slots as it can have
choices on one rank, min(k, N / E); empty ones hold expert -1.
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
from .agreement import raise_disagreement
from .groups import ParallelGroups
from .plan import Plan, make_plan

Compute = Callable[[Tensor, Routing], Tensor]


class Sent(NamedTuple):
    """What a rank sent to all others together. message: as named above; vectors: the bytes of token vectors in it."""

    message: str
    rows: int
    vectors: int
    bytes: int


class Dispatch:
    """What stands between the router of a layer and its experts when these are spread over ranks.

    Args:
        num_experts: N, of the whole layer.
        groups: where they are.
    """

    def __init__(self, num_experts: int, groups: ParallelGroups) -> None:
        self.num_experts, self.groups = num_experts, groups
        self.watchers: list[list[Sent]] = []
        self.unsynced = False  # whether a backward pass has left gradients that sync_expert_gradients has not seen

    def __call__(self, x: Tensor, routing: Routing, compute: Compute) -> Tensor:
        """x (T, d) -> y (T, d); ``compute`` is given (rows (R, d), their routing over this rank's experts)."""
        # The check spares uncompiled models the import of the compiler, a matter of seconds.
        return (self._run_uncompiled if torch.compiler.is_compiling() else self._run)(x, routing, compute)

    @torch._disable_dynamo  # how many rows come is known at run time alone
    def _run_uncompiled(self, x: Tensor, routing: Routing, compute: Compute) -> Tensor:
        return self._run(x, routing, compute)

    def _run(self, x: Tensor, routing: Routing, compute: Compute) -> Tensor:
        # In the dtype that the experts' products take anyway; half the bytes under autocast.
        device = x.device.type
        x = x.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype)
        groups, k = self.groups, routing.indices.shape[1]
        share = self.num_experts // groups.expert_parallel
        plan = make_plan(routing.indices, share, groups.expert_parallel, groups.ep_rank)
        exchange = Exchange(self, plan, x.shape[0], Row.of(x, min(k, share)), k)
        local = routing.indices.remainder(share)
        rows, weights, indices = _Forward.apply(x, routing.weights, local, exchange)
        kind = PartialRouting if routing.absent or k < self.num_experts else Routing
        y = compute(rows, kind(indices, weights, None))
        return _Output.apply(y, exchange)


class Row(NamedTuple):
    """The layout of a row of the forward message, in bytes: x, weights, experts, padded to a multiple of 8."""

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
    def size_back(self) -> int:
        """Without the experts: gradients of x and of the weights."""
        return -(-self.indices_at // 8) * 8

    def x(self, buffer: Tensor, dtype: torch.dtype) -> Tensor:
        return buffer[:, : self.vector].view(dtype)

    def weights(self, buffer: Tensor) -> Tensor:
        return buffer[:, self.weights_at : self.indices_at].view(torch.float32)

    def indices(self, buffer: Tensor) -> Tensor:
        return buffer[:, self.indices_at : self.indices_at + 2 * self.slots].view(torch.int16)


class Exchange:
    """The rows of one pass: how many go where, and sending them there and back."""

    def __init__(self, dispatch: Dispatch, plan: Plan, num_tokens: int, row: Row, k: int) -> None:
        self.dispatch, self.plan, self.num_tokens, self.row = dispatch, plan, num_tokens, row
        groups = dispatch.groups
        own = torch.stack([plan.rows, torch.full_like(plan.rows, k), torch.full_like(plan.rows, row.size)], 1)
        theirs = torch.empty_like(own)
        dist.all_to_all_single(theirs, own, group=groups.ep_group)
        self._note("sizes", groups.expert_parallel - 1, 0, own[0].numel() * own.element_size())
        own_rows, came = plan.rows.tolist(), theirs.tolist()
        # A rank with another k or dtype would send rows that the others take for something else.
        first = groups.rank - groups.ep_rank
        raise_disagreement(
            [{"top_k": entry[1], "the bytes of a token (width, dtype, k)": entry[2]} for entry in came],
            range(first, first + groups.expert_parallel),
        )
        self.there, self.back = own_rows, [entry[0] for entry in came]
        self.own = self.there[groups.ep_rank]
        self.there[groups.ep_rank] = self.back[groups.ep_rank] = 0
        self.sent, self.received = sum(self.there), sum(self.back)

    def send(self, message: str, rows: Tensor, out: Tensor, vector: int) -> None:
        """Rows (sent, ...) for the others -> out (received, ...)."""
        self._all_to_all(message, rows, out, self.there, self.back, vector)

    def give_back(self, message: str, rows: Tensor, out: Tensor, vector: int) -> None:
        """The way back: rows (received, ...) -> out (sent, ...)."""
        self._all_to_all(message, rows, out, self.back, self.there, vector)

    def _all_to_all(
        self, message: str, rows: Tensor, out: Tensor, give: list[int], take: list[int], vector: int
    ) -> None:
        assert rows.is_contiguous() and out.is_contiguous()
        dist.all_to_all_single(out, rows, take, give, group=self.dispatch.groups.ep_group)
        self._note(message, rows.shape[0], vector, rows.stride(0) * rows.element_size())

    def _note(self, message: str, rows: int, vector: int, size: int) -> None:
        for watcher in self.dispatch.watchers:
            watcher.append(Sent(message, rows, rows * vector, rows * size))

    def sum_pairs(self, pairs: Tensor) -> Tensor:
        """(P, d) rows in the plan's order -> (T, d), summed in float32, rounded once."""
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
        plan, row, own = exchange.plan, exchange.row, exchange.own
        tokens, columns = plan.tokens, plan.columns
        absent = columns < 0
        source = tokens.unsqueeze(1), columns.clamp_min(0)
        pair_weights = weights.float()[source].masked_fill_(absent, 0)
        pair_indices = indices[source].masked_fill_(absent, -1)
        out = x.new_empty(exchange.sent, row.size, dtype=torch.uint8)
        row.x(out, x.dtype).copy_(x[tokens[own:]])
        row.weights(out).copy_(pair_weights[own:])
        row.indices(out).copy_(pair_indices[own:])
        came = x.new_empty(exchange.received, row.size, dtype=torch.uint8)
        exchange.send("forward", out, came, row.vector)
        rows = torch.cat([x[tokens[:own]], row.x(came, x.dtype)])
        row_weights = torch.cat([pair_weights[:own], row.weights(came)])
        row_indices = torch.cat([pair_indices[:own], row.indices(came).to(pair_indices.dtype)])
        ctx.mark_non_differentiable(row_indices)
        ctx.weights_dtype = weights.dtype
        return rows, row_weights, row_indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        exchange = ctx.exchange
        plan, row, own = exchange.plan, exchange.row, exchange.own
        exchange.dispatch.unsynced = True
        pairs = grad_rows.new_empty(own + exchange.sent, row.width)
        pairs[:own] = grad_rows[:own]
        if not ctx.needs_input_grad[1]:
            exchange.give_back("input", grad_rows[own:].contiguous(), pairs[own:], row.vector)
            return exchange.sum_pairs(pairs), None, None, None
        out = grad_rows.new_empty(exchange.received, row.size_back, dtype=torch.uint8)
        row.x(out, grad_rows.dtype).copy_(grad_rows[own:])
        row.weights(out).copy_(grad_weights[own:])
        back = grad_rows.new_empty(exchange.sent, row.size_back, dtype=torch.uint8)
        exchange.give_back("input", out, back, row.vector)
        pairs[own:] = row.x(back, grad_rows.dtype)
        pair_weights = torch.cat([grad_weights[:own], row.weights(back)])
        # One column more, for empty slots.
        grad = grad_weights.new_zeros(exchange.num_tokens, ctx.num_choices + 1)
        grad[plan.tokens.unsqueeze(1), plan.columns.remainder(ctx.num_choices + 1)] = pair_weights
        return exchange.sum_pairs(pairs), grad[:, :-1].to(ctx.weights_dtype), None, None


class _Output(torch.autograd.Function):
    """Outputs (R, d) -> y (T, d), the sum of what a token's ranks made of it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange, own = exchange, exchange.own
        pairs = rows.new_empty(own + exchange.sent, rows.shape[1])
        pairs[:own] = rows[:own]
        exchange.give_back("output", rows[own:].contiguous(), pairs[own:], rows.shape[1] * rows.element_size())
        return exchange.sum_pairs(pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        tokens, own = exchange.plan.tokens, exchange.own
        exchange.dispatch.unsynced = True
        grad = grad_y.new_empty(own + exchange.received, grad_y.shape[1])
        grad[:own] = grad_y[tokens[:own]]
        vector = grad_y.shape[1] * grad_y.element_size()
        exchange.send("gradient", grad_y[tokens[own:]], grad[own:], vector)
        return grad, None
