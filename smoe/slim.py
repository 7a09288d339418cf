"""Votes for experts, and keeping the most voted ones (the paper's "self-slimmable" models, section 4.3)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .control import check_whole, record_routing, smoe_layers
from .layer import SMoE
from .modulize.narrow import keep_experts
from .router import Routing

Votes = dict[str, Tensor]
Key = str | int  # of an entry of a batch: the name in a mapping, the index in a tuple or list


@torch.no_grad()
def vote(model: nn.Module, batches: Iterable[Any], mask: Key | Mapping[str, Key] | None = None) -> Votes:
    """Counts how often each expert is chosen while ``model`` reads ``batches``, in evaluation mode, at its current k.

    Args:
        batches: what the model is called with: mappings (``model(**batch)``), tuples or lists (``model(*batch)``), or
            anything else (``model(batch)``), on the model's device.
        mask: the entry of a batch that tells tokens (nonzero) from padding (0), such as ``"attention_mask"``: padding
            then has no vote. For a model whose parts see different tokens, one entry per beginning of a layer's name:
            ``{"encoder": "attention_mask", "decoder": "decoder_attention_mask"}``. None counts every token.

    Returns:
        For every SMoE layer, by name, (N,) int64 counts, which add up to tokens * k.

    Raises:
        ValueError: the model has no SMoE layer, there is no batch, or a batch has no mask of the size that a layer
            needs.
    """
    layers = smoe_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no SMoE layer; there is nothing to vote for")
    full = [name for name, layer in layers if layer.top_k == layer.num_experts]
    if full:
        warnings.warn(
            f"{full[0]} activates all of its experts, so all get the same votes; call smoe.set_top_k(model, k) first",
            stacklevel=3,
        )
    keys = {name: _mask_key(name, mask) for name, _ in layers}
    votes = {name: torch.zeros(layer.num_experts, dtype=torch.int64) for name, layer in layers}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    seen = False
    try:
        for batch in batches:
            seen = True
            with ExitStack() as stack:
                routings = {name: stack.enter_context(record_routing(layer)) for name, layer in layers}
                _call(model, batch)
            for name, of_layer in routings.items():
                tokens = None if keys[name] is None else _entry(batch, keys[name]).reshape(-1) != 0
                for routing in of_layer:
                    chosen = _chosen(routing, tokens, name).reshape(-1).cpu()
                    votes[name] += torch.bincount(chosen, minlength=votes[name].numel())
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not seen:
        raise ValueError("batches is empty; at least one batch must vote")
    return votes


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


def _mask_key(name: str, mask: Key | Mapping[str, Key] | None) -> Key | None:
    """Which entry of a batch masks the tokens of the layer ``name``."""
    if not isinstance(mask, Mapping):
        return mask
    for beginning, key in mask.items():
        if name.startswith(beginning):
            return key
    raise ValueError(f"mask has no entry for layer {name}; its keys must be the beginnings of the layers' names")


def _entry(batch: Any, key: Key) -> Tensor:
    try:
        return batch[key]
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"mask is {key!r}, but a batch ({type(batch).__name__}) has no such entry") from None


def _chosen(routing: Routing, tokens: Tensor | None, name: str) -> Tensor:
    """The (tokens, k) indices of a routing, without padding."""
    if tokens is None:
        return routing.indices
    if tokens.numel() != routing.indices.shape[0]:
        raise ValueError(
            f"the mask of a batch has {tokens.numel()} entries, but layer {name} saw {routing.indices.shape[0]} tokens "
            "in one pass; mask must name one entry per token (and a model must not run its MLPs in chunks)"
        )
    return routing.indices[tokens.to(routing.indices.device)]


@torch.no_grad()
def slim(model: nn.Module, votes: Votes, keep: int = 8) -> nn.Module:
    """Keeps, in every SMoE layer, the ``keep`` experts with the most votes, in place, and returns the model.

    The other experts and their rows of the router are gone: the model is smaller, and N is now ``keep``. Experts stay
    in their order; of equal votes the first wins. k goes down to ``keep`` where it was more. Create the optimizer
    afterwards: the parameters are new.

    A token whose chosen experts all stay is computed as before:

    - ``output_scale="num_experts"`` becomes the number that N was in training; ``"k"`` follows k as ever.
    - ``score="softmax_after_topk"`` and ``"sum"`` weigh the same experts the same.
    - ``score="softmax_before_topk"`` is the exception. Its softmax now runs over the experts that stay, so the weights
      of a token grow by one factor, 1 / (the probability that these experts had).

    Args:
        votes: from :func:`vote`, or (N,) numbers of your own for every layer.

    Raises:
        ValueError: votes do not fit the model's layers, or keep is not in 1..N. Nothing is changed then.
    """
    layers = dict(smoe_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no SMoE layer; there is nothing to slim")
    check_whole(model, "slim")
    if votes.keys() != layers.keys():
        odd = sorted(votes.keys() ^ layers.keys())
        raise ValueError(f"votes don't fit: {odd[0]!r} is only in the {'votes' if odd[0] in votes else 'model'}")
    for name, layer in layers.items():
        if tuple(votes[name].shape) != (layer.num_experts,):
            raise ValueError(
                f"the votes of {name} have shape {tuple(votes[name].shape)}; it must be ({layer.num_experts},)"
            )
        if votes[name].isnan().any():
            raise ValueError(f"the votes of {name} are {votes[name].tolist()}; they must be numbers")
        if isinstance(keep, bool) or not isinstance(keep, int) or not 1 <= keep <= layer.num_experts:
            raise ValueError(f"keep is {keep!r}; it must be a whole number from 1 to {layer.num_experts}, N of {name}")
    kept = {name: votes[name].argsort(descending=True, stable=True)[:keep].sort().values for name in layers}
    _check_shared(layers, kept)
    for name, layer in layers.items():
        keep_experts(layer, kept[name])
    return model


def _check_shared(layers: dict[str, SMoE], kept: dict[str, Tensor]) -> None:
    """A ValueError where layers that share a router or experts would keep different ones."""
    for part in ("router", "experts"):
        first: dict[int, str] = {}
        for name, layer in layers.items():
            other = first.setdefault(id(getattr(layer, part)), name)
            if not torch.equal(kept[other], kept[name]):
                raise ValueError(f"{other} and {name} share their {part}; give both the same votes, such as the sum")
