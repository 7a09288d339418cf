"""Votes for experts, and keeping the most voted ones (the paper's "self-slimmable" models, section 4.3)."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .control import check_whole, one_per_layer, record_routing, smoe_layers
from .evaluating import evaluating
from .layer import SMoE
from .modulize.narrow import keep_experts
from .padding import Mask, mask_key, real_tokens
from .router import Routing

Votes = dict[str, Tensor]
VoteScore = Literal["count", "weight", "reap"]
VOTE_SCORES: tuple[str, ...] = get_args(VoteScore)
Pass = tuple[Routing, Tensor | None]  # what a layer's router chose, and the layer's input (T, d) where a score needs it


@torch.no_grad()
def vote(model: nn.Module, batches: Iterable[Any], mask: Mask = None, score: VoteScore = "count") -> Votes:
    """Scores every expert while ``model`` reads ``batches``, in evaluation mode, at its current k.

    Args:
        batches: what the model is called with: mappings (``model(**batch)``), tuples or lists (``model(*batch)``), or
            anything else (``model(batch)``), on the model's device.
        mask: the entry of a batch that tells tokens (nonzero) from padding (0): padding has no vote. For a model whose
            parts see different tokens, one entry per beginning of a layer's name:
            ``{"encoder": "attention_mask", "decoder": "decoder_attention_mask"}``. None takes ``attention_mask`` from
            mappings that have one (in the decoder of an encoder-decoder of Transformers ``decoder_attention_mask``)
            and counts every token of other batches. False counts every token.
        score: of an expert, over all tokens that chose it:
            ``count``: how many they are, as in the paper;
            ``weight``: the sum of their routing weights;
            ``reap``: the mean of routing weight times the norm of the expert's output, 0 if no token chose it (REAP,
            Lasby et al. 2025, arXiv 2510.13999). The weight includes the layer's ``output_scale``.

    Returns:
        For every SMoE layer, by name, (N,) scores: int64 counts, which add up to tokens * k, or float64.

    Raises:
        ValueError: the model has no SMoE layer, there is no batch, a batch has no mask of the size that a layer needs,
            or ``reap`` needs experts that are not here (see ``check_whole``).
    """
    from .flops import as_call  # not at the top: `import smoe` would import it

    if score not in VOTE_SCORES:
        raise ValueError(f"score is {score!r}; it must be one of {', '.join(VOTE_SCORES)}")
    layers = dict(smoe_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no SMoE layer; there is nothing to vote for")
    if any(layer.k_per_row is not None for layer in layers.values()):
        raise ValueError("k is a tensor, one per row; vote at one k")
    if score == "reap":
        check_whole(model, "vote")
    full = [name for name, layer in layers.items() if layer.top_k == layer.num_experts]
    if full and score == "count":
        warnings.warn(
            f"{full[0]} activates all of its experts, so all get the same votes; call smoe.set_top_k(model, k) first",
            stacklevel=3,
        )
    keys = {name: mask_key(name, mask, model) for name in layers}
    counts = {name: torch.zeros(layer.num_experts, dtype=torch.int64) for name, layer in layers.items()}
    sums = {name: torch.zeros(layer.num_experts, dtype=torch.float64) for name, layer in layers.items()}
    seen = False
    with evaluating(model):
        for batch in batches:
            seen = True
            with ExitStack() as stack:
                passes = {name: stack.enter_context(_passes(layer, score)) for name, layer in layers.items()}
                args, kwargs = as_call(batch)
                model(*args, **kwargs)
            for name, layer in layers.items():
                tokens = real_tokens(batch, keys[name], chosen=mask is not None)
                for routing, x in passes[name]:
                    routing, x = _without_padding(routing, x, tokens, name)
                    indices = routing.indices.reshape(-1).cpu()
                    counts[name] += torch.bincount(indices, minlength=layer.num_experts)
                    if score != "count":
                        gained = routing.weights if x is None else routing.weights * _norms(layer, x, routing.indices)
                        gained = gained.reshape(-1).double().cpu()
                        sums[name] += torch.bincount(indices, weights=gained, minlength=layer.num_experts)
    if not seen:
        raise ValueError("batches is empty; at least one batch must vote")
    if score == "reap":
        return {name: total / counts[name].clamp(min=1) for name, total in sums.items()}
    return counts if score == "count" else sums


@contextmanager
def _passes(layer: SMoE, score: VoteScore) -> Iterator[list[Pass]]:
    """Within the block, lists every pass through ``layer``."""
    passes: list[Pass] = []
    if score != "reap":
        with record_routing(layer) as routings:
            yield passes
        passes.extend((routing, None) for routing in routings)
        return

    def record(_: nn.Module, args: tuple[Tensor, Routing, Any]) -> None:
        passes.append((args[1], args[0]))

    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # a model that was compiled without the hook would never call it
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(layer.experts.register_forward_pre_hook(record).remove)
        yield passes


def _norms(layer: SMoE, x: Tensor, indices: Tensor) -> Tensor:
    """The norms (T, k) of what the chosen experts, ``indices`` (T, k), make of x (T, d)."""
    one = torch.ones(len(x), 1, dtype=torch.float32, device=x.device)
    outputs = (layer._compute(x, layer.experts, Routing(slot.unsqueeze(1), one, None)) for slot in indices.unbind(1))
    return torch.stack([output.float().norm(dim=-1) for output in outputs], dim=1)


def _without_padding(routing: Routing, x: Tensor | None, tokens: Tensor | None, name: str) -> Pass:
    if tokens is None:
        return routing, x
    if tokens.numel() != routing.indices.shape[0]:
        raise ValueError(
            f"the mask of a batch has {tokens.numel()} entries, but layer {name} saw {routing.indices.shape[0]} tokens "
            "in one pass; mask must name one entry per token, or be False, which counts padding too (and a model must "
            "not run its MLPs in chunks)"
        )
    tokens = tokens.to(routing.indices.device)
    kept = Routing(routing.indices[tokens], routing.weights[tokens], None)
    return kept, None if x is None else x[tokens]


@torch.no_grad()
def slim(model: nn.Module, votes: Votes, keep: int | Sequence[int] = 8) -> nn.Module:
    """Keeps, in every SMoE layer, the ``keep`` experts with the highest votes, in place, and returns the model.

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
        keep: one number for all SMoE layers, or one per layer in the model's order.

    Raises:
        ValueError: votes do not fit the model's layers, a list has not one keep per layer, or a keep is not in 1..N of
            its layer. Nothing is changed then.
    """
    layers = dict(smoe_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no SMoE layer; there is nothing to slim")
    check_whole(model, "slim")
    if votes.keys() != layers.keys():
        odd = sorted(votes.keys() ^ layers.keys())
        raise ValueError(f"votes don't fit: {odd[0]!r} is only in the {'votes' if odd[0] in votes else 'model'}")
    keeps = one_per_layer("keep", keep, len(layers), f"{type(model).__name__} has {len(layers)} SMoE layers")
    for (name, layer), count in zip(layers.items(), keeps, strict=True):
        if tuple(votes[name].shape) != (layer.num_experts,):
            raise ValueError(
                f"the votes of {name} have shape {tuple(votes[name].shape)}; it must be ({layer.num_experts},)"
            )
        if votes[name].isnan().any():
            raise ValueError(f"the votes of {name} are {votes[name].tolist()}; they must be numbers")
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= layer.num_experts:
            raise ValueError(f"keep is {count!r}; it must be a whole number from 1 to {layer.num_experts}, N of {name}")
    kept = {
        name: votes[name].argsort(descending=True, stable=True)[:count].sort().values
        for name, count in zip(layers, keeps, strict=True)
    }
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
