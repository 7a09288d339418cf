"""The MLP of a dense transformer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .activation import get_activation


class DenseMLP(nn.Module):
    """The transformer's MLP: Linear, activation, a dropout of some kind, Linear. (..., d) -> (..., d)."""

    def __init__(
        self, d_model: int, d_hidden: int, *, activation: str | Callable[[Tensor], Tensor] = "relu", dropout: nn.Module
    ) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_hidden)
        self.activation = get_activation(activation)
        self.dropout = dropout
        self.down = nn.Linear(d_hidden, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(self.activation(self.up(x))))
