"""Transformers' own ``save_pretrained`` writes the record too: so do ``Trainer`` and whatever else calls it."""

from __future__ import annotations

import functools
import inspect
import sys
from pathlib import Path
from typing import Any

from torch import nn

from .folder import OWN_CONFIG
from .record import describe


def is_transformers_model(model: nn.Module) -> bool:
    """Whether ``model`` is one of Transformers' (and not just built of their layers)."""
    modeling = sys.modules.get("transformers.modeling_utils")  # without it there can't be such a model
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def record_when_saving() -> None:
    """From now on ``PreTrainedModel.save_pretrained`` writes the record into ``config.json``, under the key ``smoe``.

    The record describes the very model that is saved, as it is at that moment. A note on its config could do neither:
    models and their parts share one config, and k changes after it is written. Models without SMoE layers are saved
    as ever.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or hasattr(modeling.PreTrainedModel.save_pretrained, "writes_smoe_record"):
        return
    original = modeling.PreTrainedModel.save_pretrained
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        record = describe(self)
        vars(self.config).pop("smoe", None)  # may be there from the config of a folder that was loaded
        if record is None:
            return original(self, *args, **kwargs)
        call = signature.bind(self, *args, **kwargs)
        if "save_original_format" in signature.parameters:
            # The names that the architecture's first release gave its weights: no place for experts among them.
            call.arguments.setdefault("save_original_format", False)
        self.config.smoe = record.to_json()
        try:
            result = original(*call.args, **call.kwargs)
        finally:
            vars(self.config).pop("smoe", None)
        # Left from a model that is not of Transformers, it would be taken for the record.
        Path(call.arguments["save_directory"], OWN_CONFIG).unlink(missing_ok=True)
        return result

    save_pretrained.writes_smoe_record = True
    modeling.PreTrainedModel.save_pretrained = save_pretrained
