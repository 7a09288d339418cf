"""The model card of a saved model with experts: how to load it, and how many parameters every k uses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..control import get_top_k, smoe_layers
from ..parameters import parameter_counts

CARD = "README.md"
OURS = "<!-- by smoe, which writes it anew when a model is saved here again -->"
_MOST_ROWS = 16

_TEXT = """---
library_name: transformers
{base}tags:
- mixture-of-experts
- smoe
---

{ours}

# {architecture} with any number of experts per token

{layers} of its MLPs are cut into {num_experts} experts by smoe. It was saved with {k}
of them active per token.

```python
import smoe.hf
from {module} import {architecture}

model = {architecture}.from_pretrained("folder")
smoe.set_top_k(model, {top_k})
```

{table}
"""


def write_card(model: nn.Module, folder: Path) -> None:
    """Writes README.md about a Transformers model with experts; about another model it says nothing and writes none."""
    layers = [layer for _, layer in smoe_layers(model)]
    if not layers:
        return
    # No more than every layer has: set_top_k takes no other k for all.
    active = parameter_counts(model, ks_of_table(min(layer.num_experts for layer in layers)))["active_per_k"]
    text = _TEXT.format(
        ours=OURS,
        module=_module_of(type(model)),
        top_k=get_top_k(model),
        base=_base_model(model),
        architecture=type(model).__name__,
        layers=len(layers),
        num_experts=_one_or_range(layer.num_experts for layer in layers),
        k=_one_or_range(layer.top_k for layer in layers),
        table=table([{"k": k, "active parameters": f"{count:,}"} for k, count in active.items()]),
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def is_somebodys(folder: Path) -> bool:
    """Whether the folder has a README.md that smoe has not written."""
    card = folder / CARD
    return card.exists() and not (card.is_file() and OURS.encode() in card.read_bytes())


def ks_of_table(num_experts: int, also: Iterable[int] = ()) -> list[int]:
    """Every k; where there are many, the powers of two, N and ``also``."""
    if num_experts <= _MOST_ROWS:
        return [*range(1, num_experts + 1)]
    return sorted({2**i for i in range(num_experts.bit_length())} | {num_experts, *also})


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a column for every name in the rows."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _base_model(model: Any) -> str:
    """The line that names the model on the hub that this one came from; a local folder is nobody else's business."""
    name = str(model.name_or_path or "")
    # The hub's models have a commit; without it, the name is a folder's, there or gone.
    from_hub = getattr(model.config, "_commit_hash", None) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)
    return f"base_model: {name}\n" if from_hub and not Path(name).exists() else ""


def _module_of(architecture: type) -> str:
    """What the class is imported from: Transformers itself rather than the module within it."""
    module = architecture.__module__
    return "transformers" if module.startswith("transformers.") else module


def _one_or_range(numbers: Any) -> str:
    numbers = sorted(set(numbers))
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
