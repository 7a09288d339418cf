"""Bits per character of a trained Transformer-XL at any number of activated experts.

python -m transformer_xl.evaluate RUN --k 1 2 4 8 16 [--split test] [--json]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from smoe.errors import run_main
from smoe.run.checkpoint import Checkpoint
from smoe.run.evaluation import Measure, bits_per_token, evaluation_command, recover_run
from smoe.run.precision import resolve_precision
from transformer_xl.config import TrainConfig
from transformer_xl.data import evaluation_segments, load_split
from transformer_xl.model import TransformerXL


def evaluate(
    model: nn.Module,
    config: TrainConfig,
    data: np.ndarray,
    device: torch.device,
    *,
    k: int | None,
    rank: int = 0,
    world_size: int = 1,
    reduce: Callable[[Tensor], Tensor] = lambda total: total,
) -> float:
    """Bits per character on ``data`` (bytes), with long memory and k activated experts (None: dense).

    The model is back in its mode, at its own k and with its generator where they were. ``reduce`` sums a tensor over
    all processes; each evaluates its share of the rows.
    """

    def losses() -> Iterator[tuple[Tensor, int]]:
        memory = None
        segments = evaluation_segments(
            data, config.eval_batch_size, config.eval_tgt_len, rank, world_size, config.eval_tokens
        )
        for inputs, targets in segments:
            output = model(inputs.to(device), targets.to(device), memory, config.eval_mem_len)
            memory = output.memory
            yield output.loss, int((targets >= 0).sum())

    precision = resolve_precision(config.precision, device)
    return bits_per_token(model, losses(), device, k=k, precision=precision, rank=rank, reduce=reduce)


def load_run(path: str | Path, which: str = "best") -> tuple[TrainConfig, TransformerXL, Checkpoint]:
    """The configuration, the model (on the CPU) and the checkpoint of a run; ``which`` is ``best`` or ``last``.

    Raises ValueError when ``path`` holds no run, CheckpointError when none of its checkpoints can be read.
    """
    config, checkpoint = recover_run(path, which, TrainConfig, "a Transformer-XL")
    model = config.build_model()
    model.load_state_dict(checkpoint.tensors["model"])
    return config, model, checkpoint


def _prepare(
    config: TrainConfig, model: nn.Module, checkpoint: Checkpoint, data_dir: str, split: str, device: torch.device
) -> Measure:
    data = load_split(data_dir, split)
    return lambda k: evaluate(model, config, data, device, k=k)


def main(argv: list[str] | None = None) -> None:
    evaluation_command(
        argv,
        module="transformer_xl.evaluate",
        trainer="transformer_xl.train",
        limit="tokens",
        load_run=load_run,
        prepare=_prepare,
    )


if __name__ == "__main__":
    run_main(main)
