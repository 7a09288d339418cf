"""Dense: every token visits all experts, with weight 0 where it has not chosen them. No rows are gathered.

All experts with weights are one dense MLP whose hidden units are scaled. At k = N that is all there is to compute;
below, the superfluous arithmetic is cheaper than gathering where k is near N or experts are tiny.
"""

from __future__ import annotations

from torch import Tensor

from ..experts import Experts
from ..router import Routing
from . import fused

# Experts narrower than this many hidden units are computed side by side in one product, as many as it takes.
MERGED_WIDTH = 512


def compute(x: Tensor, experts: Experts, routing: Routing) -> Tensor:
    """x (T, d) -> y (T, d), the same numbers as ``reference.compute``. Not differentiable twice."""
    # Scattered also at k = N: a custom router's indices need not be in the order of the experts.
    weights = fused.dense_weights(routing.weights, routing.indices, experts.num_experts, routing.absent)
    return fused.run(x, weights, None, merge_width(experts), experts)


def merge_width(experts: Experts) -> int:
    """How many experts to compute in one product: a divisor of N, the least that is wide enough."""
    n = experts.num_experts
    return next(m for m in range(1, n + 1) if n % m == 0 and (m * experts.d_expert >= MERGED_WIDTH or m == n))
