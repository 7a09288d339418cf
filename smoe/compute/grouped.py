"""Grouped: every expert computes the tokens that chose it, and no others. k/N of the dense MLP's arithmetic.

What makes it fast, above all on a CPU:

- the outputs of a token's experts are summed by one embedding bag, which applies the routing weights in passing;
- temporaries are one expert's or one chunk's and are used again and again, so that they stay in the cache and no fresh
  pages have to be fetched from the system (for PyTorch's dense MLP that costs as much as some of its products);
- the product with the routing weight, where it has to be made, is made on the narrower side, d or h;
- backward keeps x and one tensor of hidden units, whose gradient takes its place, and gathers rows anew; the bias of
  the second layer, its gradient, and its part in the gradient of the routing weights are one small product each for all
  experts together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..experts import Experts
from ..router import Routing
from .dense import dense_weights
from .fast_path import FAST_PATHS, FastPath, Inputs, Parameters
from .function import run
from .grouping import Grouping, group
from .hidden import activated, flatten, kept_units, linear_gradients, may_fuse_relu, room_for_gradients, unflatten
from .products import group_dots, mm_into


def compute(x: Tensor, experts: Experts, routing: Routing) -> Tensor:
    """x (T, d) -> y (T, d), the same numbers as ``reference.compute``. Not differentiable twice."""
    return run("grouped", x, routing.weights, routing.indices, experts)


def forward(inputs: Inputs, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """See ``FastPath``. What is saved is one ``Kept`` per expert."""
    x, weights, indices, activation, parameters, _ = inputs
    num_experts, h = parameters.up.shape[:2]
    experts = _per_expert(parameters, num_experts)
    grouping = group(x, indices, num_experts)
    weights = grouping.without_absent(weights)
    fuse = may_fuse_relu(x, indices.numel() * h, parameters, activation)
    rows = x.new_empty(grouping.longest, x.shape[1])
    kept = [kept_units(_gather(x, grouping, e, rows), expert, inputs, fuse) for e, expert in enumerate(experts)]
    hidden_buffer = x.new_empty(max(end - start for chunk in grouping.chunks for start, end in chunk.spans), h)

    def output(e: int, part: slice, out: Tensor) -> None:
        mm_into(out, activated(kept[e].rows(part), activation, hidden_buffer[: out.shape[0]]), experts[e].down)

    y = x.new_empty(x.shape)
    _sum_over_experts(output, grouping, indices, weights, y)
    if parameters.down_bias is not None:
        y.addmm_(dense_weights(weights, indices, num_experts, grouping.absent is not None), parameters.down_bias)
    return y, flatten(kept) if keep else []


def backward(
    inputs: Inputs, grad_y: Tensor, saved: list[Tensor], grads: Parameters, need_weights: bool, reuse: bool
) -> tuple[Tensor, Tensor | None]:
    """See ``FastPath``.

    Shapes, for one expert with n pairs:

    rows          (n, d)  the rows of grad_y, later of x, for its pairs; ``weighted``: times pair_weights
    pair_weights  (n, 1)  the routing weights of its pairs; their gradient is grad_pair_weights
    grad_hidden   (n, h)  gradient of its hidden units
    grad_linear   (n, h)  gradients of what its first linear layers put out

    Gradients carry the routing weight. Where it is multiplied in depends on which side is narrower and on need_weights,
    since the gradient of the weights is the product of the hidden units and a grad_hidden that does not carry them yet.

    ========  =======================  ==============================================================================
    regime    when                     what is multiplied with pair_weights
    ========  =======================  ==============================================================================
    narrow    h < d *                  hidden units (for down), then grad_hidden
    early     else, not need_weights   rows of grad_y; grad_hidden carries the weights from the start
    late      else, need_weights       rows of grad_y (for down) and of x (for up and gate); grad_hidden never carries
                                       the weights, and the sum over a token's experts multiplies grad_x with them
    ========  =======================  ==============================================================================

    * Without need_weights 2h < d, since narrow multiplies two tensors (n, h) and early one (n, d).
    """
    x, weights, indices, activation, parameters, _ = inputs
    (num_experts, h, d), gated = parameters.up.shape, parameters.gate is not None
    narrow = h < d if need_weights else 2 * h < d
    early, late = not narrow and not need_weights, not narrow and need_weights
    experts, expert_grads = _per_expert(parameters, num_experts), _per_expert(grads, num_experts)
    grouping = group(x, indices, num_experts)
    weights = grouping.without_absent(weights)
    all_pair_weights = grouping.by_pair(weights)
    # One entry more, for absent slots.
    grad_pair_weights = all_pair_weights.new_zeros(grouping.num_pairs + 1, 1) if need_weights else None
    kept = unflatten(saved, inputs)
    grads_linear = room_for_gradients(kept, reuse)
    # One buffer for rows of grad_y and of x, which are gathered when those of grad_y are done with: half the cache.
    rows_buffer = x.new_empty(grouping.longest, d)
    hidden_buffers = [x.new_empty(grouping.longest, h) for _ in range(3 if gated else 2)]
    weighted_buffer = None if narrow else x.new_empty(grouping.longest, d)
    for e, (start, end) in enumerate(grouping.spans):
        expert, grad, units, grad_linear = experts[e], expert_grads[e], kept[e], grads_linear[e]
        if start == end:
            for g in grad[:5]:
                if g is not None:
                    g.zero_()
            continue
        n, pair_weights = end - start, all_pair_weights[start:end]
        grad_hidden, spare, *spares = (buffer[:n] for buffer in hidden_buffers)
        rows = _gather(grad_y, grouping, e, rows_buffer)
        weighted = rows if narrow else torch.mul(rows, pair_weights, out=weighted_buffer[:n])
        mm_into(grad_hidden, weighted if early else rows, expert.down.t())
        if need_weights or grad.down is not None:
            hidden = activated(units, activation, spare)
        if need_weights:
            group_dots(grad_hidden, hidden, 1, grad_pair_weights[start:end])
        if grad.down is not None:
            mm_into(grad.down, (torch.mul(hidden, pair_weights, out=spare) if narrow else hidden).t(), weighted)
        if narrow:
            grad_hidden.mul_(pair_weights)
        linear_gradients(grad_hidden, units, activation, grad_linear, [spare, *spares])
        if grad.up is not None or grad.gate is not None:
            rows = _gather(x, grouping, e, rows_buffer)
            weighted = torch.mul(rows, pair_weights, out=weighted_buffer[:n]) if late else rows
        for g, grad_weight, grad_bias in (
            (grad_linear.up, grad.up, grad.up_bias),
            (grad_linear.gate, grad.gate, grad.gate_bias),
        ):
            if grad_weight is not None:
                mm_into(grad_weight, g.t(), weighted)
            if grad_bias is not None:
                grad_bias.copy_(torch.mm(pair_weights.t(), g).squeeze(0) if late else g.sum(0))
    del hidden_buffers, weighted_buffer, rows_buffer

    def input_gradient(e: int, part: slice, out: Tensor) -> None:
        mm_into(out, grads_linear[e].up[part], experts[e].up)
        if gated:
            out.addmm_(grads_linear[e].gate[part], experts[e].gate)

    grad_x, grad_weights = torch.empty_like(x), None
    _sum_over_experts(input_gradient, grouping, indices, weights if late else None, grad_x)
    if grads.down_bias is not None:
        mm_into(grads.down_bias, dense_weights(weights, indices, num_experts, grouping.absent is not None).t(), grad_y)
    if need_weights:
        grad_weights = grad_pair_weights[grouping.position.view(-1)].view(weights.shape)
        if parameters.down_bias is not None:
            grad_weights += (grad_y @ parameters.down_bias.t()).gather(1, indices.clamp_min(0))
        grad_weights = grouping.without_absent(grad_weights)
    return grad_x, grad_weights


def saved_shapes(x: Tensor, indices: Tensor, num_experts: int, h: int) -> list[tuple[int, int]]:
    """See ``FastPath``."""
    return [(end - start, h) for start, end in group(x, indices, num_experts).spans]


FAST_PATHS["grouped"] = FastPath(forward, backward, saved_shapes)


def _per_expert(parameters: Parameters, num_experts: int) -> list[Parameters]:
    """Views of every expert's own."""
    columns = ([None] * num_experts if p is None else p.unbind(0) for p in parameters)
    return [Parameters(*row) for row in zip(*columns, strict=True)]


def _gather(x: Tensor, grouping: Grouping, expert: int, buffer: Tensor) -> Tensor:
    """The rows of x for the pairs of an expert, in ``buffer``, which the next call overwrites."""
    start, end = grouping.spans[expert]
    return torch.index_select(x, 0, grouping.tokens[start:end], out=buffer[: end - start])


def _sum_over_experts(
    compute_pairs: Callable[[int, slice, Tensor], None],
    grouping: Grouping,
    indices: Tensor,
    weights: Tensor | None,
    out: Tensor,
) -> None:
    """``out[t]`` (T, d): the sum of the rows of t's pairs, times their ``weights`` (T, k); chunk by chunk.

    compute_pairs(expert, part, rows) writes the rows of a part of the expert's pairs.
    """
    most = max(sum(end - start for start, end in chunk.spans) for chunk in grouping.chunks)
    buffer = out.new_empty(most + 1, out.shape[1])
    for chunk in grouping.chunks:
        sizes = [end - start for start, end in chunk.spans]
        # Behind the pairs, a row of zeros for absent slots: a weight of 0 would not do where a pair's row is NaN.
        filled = buffer[: sum(sizes) + 1]
        *parts, zeros = filled.split([*sizes, 1])
        zeros.zero_()
        for e, ((start, end), rows) in enumerate(zip(chunk.spans, parts, strict=True)):
            if end > start:
                first = grouping.spans[e][0]
                compute_pairs(e, slice(start - first, end - first), rows)
        tokens = slice(chunk.start, chunk.end)
        position = grouping.position_in(chunk, indices)
        # One read of every pair, sums in float32, one rounding. On a CPU it is several times faster than adding expert
        # after expert with `index_add_`, which also rounds or widens each time.
        factors = None if weights is None else weights[tokens]
        out[tokens].copy_(F.embedding_bag(position, filled, mode="sum", per_sample_weights=factors))
