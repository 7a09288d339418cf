"""The model card of an exported model: how to run it, and what every k costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..flops import count
from ..modulize.card import CARD, OURS, ks_of_table, table
from .targets import Plan

_TEXT = """---
library_name: transformers
tags:
- mixture-of-experts
- smoe
---

{ours}

# {architecture} with any number of experts per token

Trained with SMoE-Dropout as a {source} whose MLPs are cut into {num_experts} experts, and exported by `smoe export`.

```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained("folder", num_experts_per_tok={k})
```

{which_k}

{table}

Parameters that one token passes through, and FLOPs of the linear layers for one token (2 per multiply-add).
"""


def write_card(
    folder: Path, model: nn.Module, plan: Plan, ks: Sequence[int] | None, metrics: Mapping[int, Mapping[str, float]]
) -> None:
    """Writes README.md with a row for each of ``ks``; None: for every k, or where there are many for powers of two."""
    num_experts = getattr(plan.config, plan.target.num_experts)
    metrics = {int(k): dict(values) for k, values in metrics.items()}
    one_k = ks is not None
    if ks is None:
        ks = ks_of_table(num_experts, metrics)
    k = plan.config.num_experts_per_tok
    which_k = (
        f"The experts' outputs are scaled for k = {k}: no other k is right."
        if one_k
        else f"`num_experts_per_tok` is any k from 1 to {num_experts}: fewer experts cost less, more of them predict "
        f"better. Without it k is {k}."
    )
    text = _TEXT.format(
        ours=OURS,
        architecture=plan.architecture,
        auto_class="AutoModelForCausalLM" if plan.architecture.endswith("ForCausalLM") else plan.architecture,
        source=type(model).__name__,
        num_experts=num_experts,
        k=k,
        which_k=which_k,
        table=table([_row(model, plan, k, metrics.get(k, {})) for k in ks]),
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def _row(model: nn.Module, plan: Plan, k: int, metrics: Mapping[str, float]) -> dict[str, Any]:
    token = torch.empty(1, 1, dtype=torch.int64, device="meta")
    counted = count(model, {"input_ids": token}, k)
    routers = [layer.router for layer in plan.layers.values()]
    # Of the target the routers' weights are parameters, fixed or not, and there are no biases.
    active = counted.params_active + sum(router.weight.numel() for router in routers)
    active -= sum(parameter.numel() for router in routers for parameter in router.parameters())
    return {"k": k, "active parameters": f"{active:,}", "FLOPs": f"{counted.paper_linear:,}", **metrics}
