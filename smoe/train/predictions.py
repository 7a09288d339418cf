"""predictions.jsonl: what a run said of each example, so that two runs can be compared on the same ones."""

from __future__ import annotations

import json
from collections.abc import Sequence

from torch import nn

from smoe.control import get_top_k, smoe_layers
from smoe.train.evaluation import k_name
from smoe.train.processes import Processes

FILE = "predictions.jsonl"


class Predictions:
    """What a task predicts of the split measured last, by k. ``Task.result_files`` returns :meth:`files`."""

    def __init__(self) -> None:
        self._by_k: dict[str, dict[str, tuple[str, bool]]] = {}

    def at(self, model: nn.Module) -> dict[str, tuple[str, bool]]:
        """A new dict for those at the model's present k: an example's name -> (the prediction, whether it is right)."""
        k = get_top_k(model) if smoe_layers(model) else None
        self._by_k[k_name(k)] = found = {}
        return found

    def joined(self, ks: Sequence[int | None], processes: Processes) -> dict[str, dict[str, tuple[str, bool]]]:
        """Those of all processes, by the name of each of ``ks``. Every process calls this."""
        return {name: processes.join(self._by_k[name]) for name in map(k_name, ks)}

    def files(self, ks: Sequence[int | None], processes: Processes, file: str = FILE) -> dict[str, str]:
        """``file``: a line per example, in which each of ``ks`` has [prediction, 1 if it is right, else 0].

        E.g. ``{"id": "12", "8": ["+ number0 number1", 0], "16": ["- number0 number1", 1]}``. Every process calls this;
        the lines have the examples of all, in the order of their names (as numbers, where they are).
        """
        by_k = self.joined(ks, processes)
        lines = (
            {"id": name} | {k: [found[name][0], int(found[name][1])] for k, found in by_k.items()}
            for name in sorted(next(iter(by_k.values())), key=lambda name: (len(name), name))
        )
        return {file: "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)}
