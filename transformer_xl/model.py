"""Transformer-XL language model (Dai et al. 2019) whose MLPs can be exchanged, batch first."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe.dense_mlp import DenseMLP
from smoe.dropout import Dropout
from smoe.options import check_bounds, option
from transformer_xl.attention import RelativeAttention, relative_distances, sinusoids


@dataclass(frozen=True)
class TransformerXLConfig:
    """Sizes of a Transformer-XL; the defaults are the 4-layer enwik8 model of the paper (released scripts).

    `d_hidden` is the width of the whole MLP, all experts together.
    Raises ValueError, naming the field, for a value that can't be used.
    """

    vocab_size: int = option(256, "token ids", at_least=1)
    num_layers: int = option(4, "transformer layers", at_least=1)
    d_model: int = option(256, "model width, even", at_least=1)
    num_heads: int = option(8, "attention heads", at_least=1)
    d_head: int = option(64, "width of a head", at_least=1)
    d_hidden: int = option(8192, "width of the MLP", at_least=1)
    dropout: float = option(0.1, "after attention and MLP, and on embeddings", at_least=0, below=1)
    attention_dropout: float = option(0.0, "on attention weights", at_least=0, below=1)
    init_std: float = option(0.02, "of the initial weights", above=0, below=math.inf)

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.d_model % 2:
            raise ValueError(f"d_model is {self.d_model}, but must be even: positions are pairs of sine and cosine")


class TransformerXLOutput(NamedTuple):
    """`loss`: mean nats per token, float32, None without targets; `logits (B, T, V)` float32; `memory (L, B, M, d)`."""

    loss: Tensor | None
    logits: Tensor
    memory: Tensor


class TransformerXLLayer(nn.Module):
    """Attention, then MLP, each followed by dropout, residual sum and layer norm (post-norm)."""

    def __init__(self, config: TransformerXLConfig, mlp: nn.Module) -> None:
        super().__init__()
        self.attention = RelativeAttention(
            config.d_model, config.num_heads, config.d_head, dropout=config.attention_dropout
        )
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.mlp = mlp
        self.mlp_norm = nn.LayerNorm(config.d_model)
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        positions: Tensor,
        content_bias: Tensor,
        position_bias: Tensor,
        token_ids: Tensor,
    ) -> Tensor:
        """`x (B, T, d)` -> `(B, T, d)`; the other arguments as in `RelativeAttention.forward`, `token_ids (B, T)`."""
        attended = self.attention(x, context, positions, content_bias, position_bias)
        x = self.attention_norm(x + self.dropout(attended))
        y = self.mlp(x, token_ids=token_ids) if getattr(self.mlp, "needs_token_ids", False) else self.mlp(x)
        return self.mlp_norm(x + self.dropout(y))


class TransformerXL(nn.Module):
    """Transformer-XL with segment memory, relative positions and a tied embedding.

    `make_mlp(layer_index)` builds the module that maps `(B, T, d) -> (B, T, d)` in each layer, any dropout inside it
    included; None builds the dense MLP. A module whose attribute `needs_token_ids` is true is called with
    `token_ids=input_ids (B, T)` as well.
    """

    def __init__(self, config: TransformerXLConfig, make_mlp: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        self.config = config
        if make_mlp is None:
            rate = config.dropout
            make_mlp = lambda _: DenseMLP(config.d_model, config.d_hidden, dropout=Dropout(rate))  # noqa: E731
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.content_bias = nn.Parameter(torch.empty(config.num_heads, config.d_head))
        self.position_bias = nn.Parameter(torch.empty(config.num_heads, config.d_head))
        self.layers = nn.ModuleList(TransformerXLLayer(config, make_mlp(i)) for i in range(config.num_layers))
        self.output_bias = nn.Parameter(torch.empty(config.vocab_size))
        self.dropout = Dropout(config.dropout)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew, as the reference implementation does.

        Linear and embedding weights and the attention biases N(0, init_std), layer norm weights N(1, init_std),
        other biases 0. A module with its own `reset_parameters(std)`, such as an SMoE layer, draws its own.
        """
        std = self.config.init_std
        for parameter in (self.embedding.weight, self.content_bias, self.position_bias):
            nn.init.normal_(parameter, 0.0, std)
        nn.init.zeros_(self.output_bias)
        for layer in self.layers:
            _initialise(layer, std)

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        memory: Tensor | None = None,
        memory_length: int = 0,
    ) -> TransformerXLOutput:
        """Predict the token after each of `input_ids (B, T)`, given what `memory` remembers of those before.

        `targets (B, T)` holds the tokens to predict; where it is -100 a token doesn't count. `memory (L, B, M, d)` is
        what the call for the previous segment returned, with any M (None at the start). The memory returned is
        the inputs of each layer at the last `memory_length` positions seen (fewer if there were fewer), detached.
        Raises ValueError if a shape or `memory_length` doesn't fit.
        """
        if targets is not None and targets.shape != input_ids.shape:
            raise ValueError(f"targets has shape {tuple(targets.shape)}, but must be {tuple(input_ids.shape)}")
        hidden, new_memory = self.encode(input_ids, memory, memory_length)
        logits = F.linear(self.dropout(hidden), self.embedding.weight, self.output_bias).float()
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return TransformerXLOutput(loss, logits, new_memory)

    def encode(self, input_ids: Tensor, memory: Tensor | None = None, memory_length: int = 0) -> tuple[Tensor, Tensor]:
        """The last layer's output `(B, T, d)`, each position knowing those before it, and the new memory as `forward`
        returns it."""
        self._check(input_ids, memory, memory_length)
        batch, t = input_ids.shape
        m = 0 if memory is None else memory.shape[2]

        x = self.dropout(self.embedding(input_ids) * self.config.d_model**0.5)
        positions = sinusoids(relative_distances(t, m + t, x.device), self.config.d_model).to(x.dtype)
        positions = self.dropout(positions)

        remembered = []
        for i, layer in enumerate(self.layers):
            context = x if m == 0 else torch.cat([memory[i].to(x.dtype), x], dim=1)
            if memory_length > 0:
                remembered.append(context[:, -memory_length:].detach())
            x = layer(x, context, positions, self.content_bias, self.position_bias, input_ids)

        return x, torch.stack(remembered) if remembered else x.new_empty(len(self.layers), batch, 0, x.shape[-1])

    def _check(self, input_ids: Tensor, memory: Tensor | None, memory_length: int) -> None:
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, but must be (batch, at least one token)")
        if memory_length < 0:
            raise ValueError(f"memory_length is {memory_length}, but must be at least 0")
        if memory is not None:
            layers, batch, d = len(self.layers), input_ids.shape[0], self.config.d_model
            if memory.dim() != 4 or (*memory.shape[:2], memory.shape[3]) != (layers, batch, d):
                raise ValueError(f"memory has shape {tuple(memory.shape)}, but must be ({layers}, {batch}, any, {d})")


def _initialise(module: nn.Module, std: float) -> None:
    """Initialise `module` and what it holds by the rules of `TransformerXL.reset_parameters`."""
    own_reset = getattr(module, "reset_parameters", None)
    if own_reset is not None and "std" in inspect.signature(own_reset).parameters:
        own_reset(std=std)
        return
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0.0, std)
    elif isinstance(module, nn.LayerNorm):
        nn.init.normal_(module.weight, 1.0, std)
    if isinstance(module, (nn.Linear, nn.LayerNorm)) and module.bias is not None:
        nn.init.zeros_(module.bias)
    for child in module.children():
        _initialise(child, std)
