"""Few: at most 64 tokens without gradients on a CPU, where starting operators costs as much as computing.

What is computed depends on how many of the experts are chosen, that is on the number of pairs P = T * k:

pairs         first and second layer: one matrix-vector product each per pair, on the weights where they lie
bag           (16-bit types, whose matrix-vector products are slow) first layer: the chosen experts, copied out below
              N / 2 pairs, else all experts; second layer: an embedding bag over the rows of the chosen experts, hidden
              unit i of an expert adding ``hidden[i] * down[i]`` to the output
all experts   one dense MLP; the hidden units carry the routing weight, 0 if their expert is not chosen

With few pairs weights are most of what is read, so that time follows P. With many, all weights are read once, in a
fixed number of operators.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..experts import Experts
from ..router import Routing
from . import dense, grouped
from .dense import dense_weights
from .fast_path import Parameters, cast
from .products import onednn_float32, onednn_linear, product_dtype, scale_, uses_onednn

MOST_TOKENS = 64
# Multiply-adds that `grouped` must save per expert before it is worth its operators: at d 768, h 192 and 64 tokens it
# was faster at k = 4 (7 million) and slower at k = 8 (4.7 million). Where float32 goes to oneDNN, which uses a second
# core better in one large product, twice as many: at k = 1 (8.8 million) `grouped` took 0.7 of the time on one core and
# 1.4 on two.
GROUPED_SAVES = 6 << 20
# Weights that one thread reads in the time that starting the products of one pair takes, about 10 us.
PAIR_STARTS = 1 << 15
# Tokens from which MKL computes the transpose of the first layer faster than the layer: 0.8 to 0.98 of the time of both
# products at 8 to 24 tokens, 1.1 to 1.5 at 2 and 4.
TRANSPOSED = 8


def usable(x: Tensor, experts: Experts, routing: Routing) -> bool:
    """Whether this path computes this input, and does it faster than ``grouped``."""
    return possible(x, experts) and pays(x.shape[0], routing.indices.shape[1], experts, product_dtype(x))


def pays(num_tokens: int, k: int, experts: Experts, dtype: torch.dtype = torch.float32) -> bool:
    """Whether this path is the fastest for so many tokens."""
    slots_left = num_tokens * (experts.num_experts - k)
    saved = slots_left * experts.d_model * experts.d_expert
    worth = GROUPED_SAVES * experts.num_experts * (2 if dtype == torch.float32 and onednn_float32() else 1)
    return 0 < num_tokens <= MOST_TOKENS and saved <= worth


def possible(x: Tensor, experts: Experts) -> bool:
    """Whether nothing is needed that this path lacks: gradients, dropout, another device, a graph of torch.compile."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    return not experts.drops and x.shape[0] > 0


def compute(x: Tensor, experts: Experts, routing: Routing) -> Tensor:
    """x (T, d) -> y (T, d), the same numbers as ``reference.compute``; by another path what is not :func:`possible`."""
    if not possible(x, experts):
        path = dense if routing.indices.shape[1] == experts.num_experts else grouped
        return path.compute(x, experts, routing)
    if not torch.is_autocast_enabled("cpu"):
        return _compute(x, experts, routing)
    x = x.to(product_dtype(x))
    with torch.autocast("cpu", enabled=False):
        return _compute(x, experts, routing)


def _compute(x: Tensor, experts: Experts, routing: Routing) -> Tensor:
    parameters = parameters_of(experts)
    if any(p is not None and p.dtype != x.dtype for p in parameters):
        parameters = cast(parameters, x.dtype)
    indices, weights, num_experts = routing.indices, routing.weights.to(x.dtype), experts.num_experts
    if not routing.absent:
        if x.dtype not in (torch.float32, torch.float64) and indices.numel() <= num_experts > indices.shape[1]:
            return _bag(x, experts, parameters, weights, indices)
        return chosen_experts(x, experts, parameters, weights, indices)
    return all_experts(x, experts, parameters, dense_weights(weights, indices, num_experts, absent=True))


def parameters_of(experts: Experts) -> Parameters:
    """The parameters themselves."""
    return Parameters(experts.up, experts.up_bias, experts.gate, experts.gate_bias, experts.down, experts.down_bias)


def chosen_experts(
    x: Tensor, experts: Experts, parameters: Parameters, weights: Tensor | None, indices: Tensor
) -> Tensor:
    """x (T, d), weights (T, k) or None (all are 1) and indices (T, k), all of one dtype -> y (T, d)."""
    num_pairs, (num_experts, h, d) = indices.numel(), parameters.up.shape
    if num_pairs < num_experts:
        unread = (num_experts - num_pairs) * h * d * (2 if parameters.gate is None else 3)
        if unread > num_pairs * PAIR_STARTS * torch.get_num_threads():
            return _pairs(x, experts, parameters, weights, indices)
    zeros = x.new_zeros(x.shape[0], num_experts)
    dense = zeros.scatter_(1, indices, 1.0) if weights is None else zeros.scatter_(1, indices, weights)
    return all_experts(x, experts, parameters, dense)


def all_experts(x: Tensor, experts: Experts, parameters: Parameters, weights: Tensor | None) -> Tensor:
    """One dense MLP whose hidden units are scaled; weights (T, N), None: all are 1."""
    up, up_bias, gate, gate_bias, down, down_bias = parameters
    transposed = x.shape[0] >= TRANSPOSED and not _uses_onednn(x)
    first = _transposed_linear if transposed else _linear
    hidden = experts.hidden(first(x, up, up_bias), None if gate is None else first(x, gate, gate_bias))
    if transposed:
        if weights is not None:  # one row of weights beside rows of hidden units, both contiguous
            hidden.view(*up.shape[:2], -1).mul_(weights.t().contiguous().unsqueeze(1))
        hidden = hidden.t()
    elif weights is not None:
        hidden = scale_(hidden, weights, hidden)
    down = down.reshape(-1, x.shape[1])
    bias = None
    if down_bias is not None:  # a product with ones is a cheaper sum
        bias = torch.mm(x.new_ones(1, down_bias.shape[0]) if weights is None else weights, down_bias)
    if x.dtype == torch.float32 and _uses_onednn(x):
        y = onednn_linear(hidden, down.t(), None)
        return y if bias is None else y.add_(bias)
    return torch.mm(hidden, down) if bias is None else torch.addmm(bias, hidden, down)


def _pairs(x: Tensor, experts: Experts, parameters: Parameters, weights: Tensor | None, indices: Tensor) -> Tensor:
    """One product per pair and matrix; weights (T, k) or None and indices (T, k)."""
    up, up_bias, gate, gate_bias, down, down_bias = parameters
    (num_tokens, k), h, chosen = indices.shape, up.shape[1], indices.reshape(-1)
    numbers, tokens = chosen.tolist(), [token for token in x.unbind(0) for _ in range(k)]

    def first(weight: Tensor, bias: Tensor | None) -> Tensor:
        """(P, h): the linear output of the chosen experts."""
        out = x.new_zeros(len(numbers), h) if bias is None else bias.index_select(0, chosen)
        for row, expert, token in zip(out.unbind(0), numbers, tokens, strict=True):
            row.addmv_(weight[expert], token)
        return out

    hidden = experts.hidden(first(up, up_bias), None if gate is None else first(gate, gate_bias))
    if down_bias is None:
        y = x.new_zeros(x.shape)
    else:
        biases = down_bias.index_select(0, chosen).view(num_tokens, k, -1)
        y = biases.sum(1) if weights is None else torch.bmm(weights.unsqueeze(1), biases).squeeze(1)
    factors = [1.0] * len(numbers) if weights is None else weights.reshape(-1).tolist()
    outputs, down = [row for row in y.unbind(0) for _ in range(k)], down.mT
    for out, row, expert, factor in zip(outputs, hidden.unbind(0), numbers, factors, strict=True):
        out.addmv_(down[expert], row, alpha=factor)
    return y


def _bag(x: Tensor, experts: Experts, parameters: Parameters, weights: Tensor, indices: Tensor) -> Tensor:
    """The chosen experts' rows; weights and indices (T, k)."""
    (num_tokens, d), k, (num_experts, h) = x.shape, indices.shape[1], parameters.up.shape[:2]
    up, up_bias, gate, gate_bias, down, down_bias = parameters
    chosen = indices.reshape(-1)

    def first(weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
        """(T, k * h): the linear output of the chosen experts."""
        if weight is None:
            return None
        if 2 * chosen.shape[0] < num_experts:
            rows = weight.index_select(0, chosen).view(num_tokens, k * h, d)
            out = torch.bmm(rows, x.unsqueeze(2)).squeeze(2) if num_tokens > 1 else torch.mv(rows[0], x[0]).unsqueeze(0)
            return out if bias is None else out.add_(bias.index_select(0, chosen).view(num_tokens, k * h))
        out = _linear(x, weight, bias).view(num_tokens, num_experts, h)
        return out.gather(1, indices.unsqueeze(2).expand(-1, -1, h)).view(num_tokens, k * h)

    hidden = experts.hidden(first(up, up_bias), first(gate, gate_bias))
    hidden = scale_(hidden, weights, hidden)
    rows = (indices.unsqueeze(2) * h + torch.arange(h)).view(-1)
    # Not F.embedding_bag, whose checks take as long as the sum itself. The 0 is mode="sum".
    first_rows = torch.arange(0, num_tokens * k * h, k * h)
    y = torch.embedding_bag(down.reshape(-1, d), rows, first_rows, False, 0, False, hidden.reshape(-1))[0]
    return y if down_bias is None else y.addmm_(dense_weights(weights, indices, num_experts, False), down_bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (T, d) through all experts' weight (N, h, d) and bias (N, h) -> (T, N * h)."""
    weight, bias = weight.reshape(-1, x.shape[1]), None if bias is None else bias.reshape(-1)
    if _uses_onednn(x):
        return onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)  # directly: `products.linear` starts one operator more


def _uses_onednn(x: Tensor) -> bool:
    """Whether a layer of all experts goes to oneDNN. In float32 also the small ones, for which other paths don't let it
    compile a kernel: few tokens come in few shapes, one above all. On one core of an AMD EPYC 9005 it takes 0.7 to 0.85
    of MKL's time at one token, 0.5 to 0.75 at 2 to 64, and only oneDNN uses a second core for one token."""
    if x.dtype != torch.float32:
        return uses_onednn(x, 1)
    return onednn_float32() and torch._C._len_torch_dispatch_stack() == 0  # counters of FLOPs don't know oneDNN's layer


def _transposed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The transpose of :func:`_linear`, (N * h, T); contiguous, since activations are slow on the other layout."""
    weight = weight.reshape(-1, x.shape[1])
    return torch.mm(weight, x.t()) if bias is None else torch.addmm(bias.reshape(-1, 1), weight, x.t())
