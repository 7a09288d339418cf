"""Transformers' own ``save_pretrained`` writes the record too: so do ``Trainer`` and whatever else calls it."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .folder import CONFIG, OWN_CONFIG
from .record import Record, describe

METHOD = "smoe"  # in quantization_config: Transformers must change the model before it loads the weights (see auto.py)
NO_RECORD = f"{CONFIG}: quantization_config names {METHOD}, but smoe records no layer"


def is_transformers_model(model: nn.Module) -> bool:
    """Whether ``model`` is one of Transformers' (and not just built of their layers)."""
    modeling = sys.modules.get("transformers.modeling_utils")  # without it there can't be such a model
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def record_when_saving() -> None:
    """From now on ``PreTrainedModel.save_pretrained`` writes the record into ``config.json``, under the key ``smoe``.

    With it goes what keeps Transformers from loading the model as a dense one: ``quantization_config``, and weights of
    the wrong shape in place of those that became experts.

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
        forget(self.config)  # may be there from the config of a folder that was loaded
        if record is None:
            return original(self, *args, **kwargs)
        call = signature.bind(self, *args, **kwargs)
        if "save_original_format" in signature.parameters:
            # The names that the architecture's first release gave its weights: no place for experts among them.
            call.arguments.setdefault("save_original_format", False)
        if not getattr(self, "_hf_peft_config_loaded", False):  # else adapters alone are saved
            state = call.arguments.get("state_dict")
            call.arguments["state_dict"] = {**(self.state_dict() if state is None else state), **wrong_weights(record)}
        self.config.smoe = record.to_json()
        self.config.quantization_config = {"quant_method": METHOD}
        try:
            result = original(*call.args, **call.kwargs)
        finally:
            forget(self.config)
        # Left from a model that is not of Transformers, it would be taken for the record.
        Path(call.arguments["save_directory"], OWN_CONFIG).unlink(missing_ok=True)
        return result

    save_pretrained.writes_smoe_record = True
    modeling.PreTrainedModel.save_pretrained = save_pretrained


def wrong_weights(record: Record) -> dict[str, Tensor]:
    """A weight of the wrong shape for every linear layer that holds an SMoE layer now.

    Whoever loads the file into a dense model gets an error about sizes instead of MLPs drawn at random.
    """
    return {f"{name}.weight": torch.zeros(1, device="cpu") for name in record.layers}


def is_wrong_weight(name: str, shape: tuple[int, ...], record: Record) -> bool:
    """Whether a saved tensor is one of :func:`wrong_weights`."""
    return name.endswith(".weight") and name.removesuffix(".weight") in record.layers and shape == (1,)


def forget(config: Any) -> None:
    """Takes out of ``config`` what was put there for saving."""
    vars(config).pop("smoe", None)
    if is_marked(vars(config)):
        del config.quantization_config


def is_marked(settings: Mapping[str, Any]) -> bool:
    """Whether a config says that its model has SMoE layers."""
    quantization = settings.get("quantization_config")
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == METHOD
