"""What a router returns: the chosen experts of every token, and their weights."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """What a router chose for T tokens.

    indices: (T, k) int64, the chosen experts of each token, all different.
    weights: (T, k) float32, the factor of each chosen expert's output.
    balance_loss: scalar, Switch's load-balancing loss (learned router), else None.
    """

    indices: Tensor
    weights: Tensor
    balance_loss: Tensor | None
    absent = False  # whether slots may be empty: only in a PartialRouting
    probabilities = None  # only a LearnedRouting has them


class PartialRouting(Routing):
    """A routing with empty slots: an index of -1 is no expert, and the weight there gets gradient 0.

    There are some where tokens have different k, and where experts are spread over ranks, on each of them.
    """

    __slots__ = ()
    absent = True


class LearnedRouting(Routing):
    """A learned router's, with the softmax over all experts, (T, N) float32, as ``probabilities``.

    An attribute, because a routing is a tuple of three. ``smoe.balance_loss(routing, mask)`` needs it.
    """

    probabilities: Tensor | None


class PartialLearnedRouting(LearnedRouting):
    """A learned router's with empty slots (see :class:`PartialRouting`)."""

    absent = True
