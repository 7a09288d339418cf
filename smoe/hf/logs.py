"""What a callback adds to the numbers that a ``Trainer`` logs."""

from __future__ import annotations

import functools
from typing import Any

from transformers import TrainerCallback


class LogsMore(TrainerCallback):
    """A callback whose ``more_logs`` go wherever the training's loss goes: TensorBoard, W&B, MLflow, ``log_history``.

    A callback's own ``on_log`` can't do that: ``Trainer`` calls those of its reporters first.
    """

    def more_logs(self, args: Any) -> dict[str, float]:
        """What to log beside the loss of the last steps. args: the ``TrainingArguments``."""
        raise NotImplementedError

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _ask_callbacks()


def _ask_callbacks() -> None:
    """From now on ``Trainer.log`` asks the callbacks of this kind. Its subclasses go on overriding it as they like."""
    from transformers import Trainer

    if hasattr(Trainer.log, "asks_callbacks"):
        return
    original = Trainer.log

    @functools.wraps(original)
    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:  # not those of an evaluation, nor the summary at the end
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, LogsMore):
                    logs.update(callback.more_logs(self.args))
        original(self, logs, *args, **kwargs)

    log.asks_callbacks = True
    Trainer.log = log
