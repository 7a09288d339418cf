"""Bits per masked token of a trained BERT or RoBERTa at any number of activated experts.

python -m bert.evaluate RUN --k 1 2 4 8 16 [--split test] [--json]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bert.config import PretrainConfig
from bert.data import Blocks, Vocabulary, evaluation_batches
from bert.model import MaskedLM, build_model
from smoe.errors import run_main
from smoe.run.checkpoint import Checkpoint
from smoe.run.evaluation import Measure, bits_per_token, evaluation_command, recover_run
from smoe.run.precision import resolve_precision


def evaluate(
    model: MaskedLM,
    config: PretrainConfig,
    data: np.ndarray,
    vocabulary: Vocabulary,
    device: torch.device,
    *,
    k: int | None,
    rank: int = 0,
    world_size: int = 1,
    reduce: Callable[[Tensor], Tensor] = lambda total: total,
) -> float:
    """Masked-LM loss / ln 2 on ``data`` (n, T) with k activated experts (None: dense); the masks are always the same.

    The model is back in its mode, at its own k and with its generator where they were. ``reduce`` sums a tensor over
    all processes; each evaluates its share of the sequences.
    """

    def losses() -> Iterator[tuple[Tensor, int]]:
        size, share, count = config.eval_batch_size, config.mask_share, config.eval_sequences
        for batch in evaluation_batches(data, vocabulary, size, share, rank, world_size, count):
            yield model(*(part.to(device) for part in batch)).loss, int((batch.targets >= 0).sum())

    precision = resolve_precision(config.precision, device)
    return bits_per_token(model, losses(), device, k=k, precision=precision, rank=rank, reduce=reduce)


def load_run(path: str | Path, which: str = "best") -> tuple[PretrainConfig, PreTrainedModel, Checkpoint]:
    """The configuration, the model (on the CPU) and the checkpoint of a run; ``which`` is ``best`` or ``last``.

    Raises ValueError when ``path`` holds no run, CheckpointError when none of its checkpoints can be read.
    """
    config, checkpoint = recover_run(path, which, PretrainConfig, "a BERT or RoBERTa")
    model = build_model(config, Vocabulary(**checkpoint.state["vocabulary"]))
    model.load_state_dict(checkpoint.tensors["model"])
    return config, model.eval(), checkpoint


def _prepare(
    config: PretrainConfig,
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    data_dir: str,
    split: str,
    device: torch.device,
) -> Measure:
    blocks = Blocks(data_dir, config.model)
    if dataclasses.asdict(blocks.vocabulary) != checkpoint.state["vocabulary"]:
        raise ValueError(f"data: {blocks.folder} has another vocabulary than the run; give the run's with --data")
    data = blocks.sequences(split, config.seq_len)
    masked_lm = MaskedLM(model)
    return lambda k: evaluate(masked_lm, config, data, blocks.vocabulary, device, k=k)


def main(argv: list[str] | None = None) -> None:
    evaluation_command(
        argv,
        module="bert.evaluate",
        trainer="bert.pretrain",
        limit="sequences",
        load_run=load_run,
        prepare=_prepare,
    )


if __name__ == "__main__":
    run_main(main)
