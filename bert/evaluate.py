"""Bits per masked token of a trained BERT or RoBERTa at any number of activated experts.

python -m bert.evaluate RUN --k 1 2 4 8 16 [--split test] [--json]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bert.config import PretrainConfig
from bert.data import EVALUATION_SEED, Blocks, Vocabulary, evaluation_batches
from bert.model import MaskedLM, build_model
from smoe import set_top_k, smoe_layers
from smoe.router import check_top_k
from smoe.run.checkpoint import Checkpoint, load_checkpoint, load_latest
from smoe.run.errors import CheckpointError, run_main
from smoe.run.folder import RunFolder


def k_name(k: int | None) -> str:
    """The key of a k in result.json: the number, or ``dense``."""
    return "dense" if k is None else str(k)


@torch.no_grad()
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
    was_training = model.training
    model.eval()
    before = []
    if k is not None:
        before = [(layer, layer.top_k) for _, layer in smoe_layers(model)]
        set_top_k(model, k)
    total = torch.zeros(2, dtype=torch.float64, device=device)  # nats, predicted tokens
    devices = [device] if device.type == "cuda" else []
    bf16 = precision(config, device) == "bf16"
    batches = evaluation_batches(
        data, vocabulary, config.eval_batch_size, config.mask_share, rank, world_size, config.eval_sequences
    )
    try:
        with torch.random.fork_rng(devices), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            torch.manual_seed(EVALUATION_SEED + rank)  # of what a router draws at random when evaluating (THOR)
            for batch in batches:
                output = model(*(part.to(device) for part in batch))
                count = (batch.targets >= 0).sum().item()
                total += torch.stack((output.loss.double() * count, total.new_tensor(count)))
    finally:
        model.train(was_training)
        for layer, top_k in before:
            layer.top_k = top_k
    nats, tokens = reduce(total).tolist()
    return nats / tokens / math.log(2)


def load_run(path: str | Path, which: str = "best") -> tuple[PretrainConfig, PreTrainedModel, Checkpoint]:
    """The configuration, the model (on the CPU) and the checkpoint of a run; ``which`` is ``best`` or ``last``.

    Raises ValueError when ``path`` holds no run, CheckpointError when none of its checkpoints can be read.
    """
    folder = RunFolder.existing(path)
    recorded = folder.read_config()
    recorded["sweep"] = tuple(recorded["sweep"])
    config = PretrainConfig(**recorded)
    latest = load_latest(folder.checkpoints, groups=["model"])
    if latest is None:
        raise CheckpointError(f"run {folder.path} has no checkpoint yet")
    checkpoint = latest
    best = latest.state.get("best_step")
    if which == "best" and best is not None and best != latest.step:
        checkpoint = load_checkpoint(folder.checkpoints / f"step-{best:08d}", groups=["model"])
    model = build_model(config, Vocabulary(**checkpoint.state["vocabulary"]))
    model.load_state_dict(checkpoint.tensors["model"])
    return config, model.eval(), checkpoint


def precision(config: PretrainConfig, device: torch.device) -> str:
    """``bf16`` or ``fp32``; ``auto`` is bf16 where the device has instructions for it."""
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bert.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("run", help="a run folder of bert.pretrain")
    parser.add_argument("--k", type=int, nargs="+", help="numbers of activated experts (default: the run's sweep)")
    parser.add_argument("--split", choices=("valid", "test"), default="test")
    parser.add_argument("--data", help="the folder with the splits (default: the run's)")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best")
    parser.add_argument("--sequences", type=int, help="evaluate on so many (default: as the run did; 0: all)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    arguments = parser.parse_args(argv)

    config, model, checkpoint = load_run(arguments.run, arguments.checkpoint)
    if arguments.sequences is not None:
        if arguments.sequences < 0:
            raise ValueError(f"sequences is {arguments.sequences}; it must be 0 (all) or more")
        config = dataclasses.replace(config, eval_sequences=arguments.sequences or None)
    routed = config.get_method().routed
    if arguments.k and not routed:
        raise ValueError(f"k is {arguments.k}; {config.method} is dense and has no experts to choose from")
    ks = [check_top_k(k, config.num_experts) for k in arguments.k] if arguments.k else config.sweep_ks()
    blocks = Blocks(arguments.data or config.data, config.model)
    if dataclasses.asdict(blocks.vocabulary) != checkpoint.state["vocabulary"]:
        raise ValueError(f"data: {blocks.folder} has another vocabulary than the run; give the run's with --data")
    data = blocks.sequences(arguments.split, config.seq_len)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    masked_lm = MaskedLM(model.to(device))
    result = {}
    for k in ks:
        result[k_name(k)] = evaluate(masked_lm, config, data, blocks.vocabulary, device, k=k)
        if not arguments.json:
            print(f"k = {k_name(k):>5}  {arguments.split} BPC {result[k_name(k)]:.4f}", flush=True)
    if arguments.json:
        report = {"run": str(arguments.run), "step": checkpoint.step, "split": arguments.split, "bpc": result}
        print(json.dumps(report | {"eval_sequences": config.eval_sequences}, indent=2))


if __name__ == "__main__":
    run_main(main)
