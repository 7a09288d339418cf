"""Bits per character of a trained Transformer-XL at any number of activated experts.

python -m transformer_xl.evaluate RUN --k 1 2 4 8 16 [--split test] [--json]
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from smoe import set_top_k, smoe_layers
from smoe.router import check_top_k
from smoe.run.checkpoint import Checkpoint, load_checkpoint, load_latest
from smoe.run.errors import CheckpointError, Parser, run_main
from smoe.run.folder import RunFolder
from transformer_xl.config import TrainConfig
from transformer_xl.data import evaluation_segments, load_split
from transformer_xl.model import TransformerXL

EVALUATION_SEED = 0  # of what a router draws at random when evaluating (THOR)


def k_name(k: int | None) -> str:
    """The key of a k in result.json: the number, or ``dense``."""
    return "dense" if k is None else str(k)


@torch.no_grad()
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
    was_training = model.training
    model.eval()
    before = None
    if k is not None:
        before = [(layer, layer.top_k) for _, layer in smoe_layers(model)]
        set_top_k(model, k)
    total = torch.zeros(2, dtype=torch.float64, device=device)  # nats, tokens
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(EVALUATION_SEED + rank)
            memory = None
            segments = evaluation_segments(
                data, config.eval_batch_size, config.eval_tgt_len, rank, world_size, config.eval_tokens
            )
            for inputs, targets in segments:
                inputs, targets = inputs.to(device), targets.to(device)
                output = model(inputs, targets, memory, config.eval_mem_len)
                memory = output.memory
                total += torch.stack((output.loss.double() * targets.numel(), total.new_tensor(targets.numel())))
    finally:
        model.train(was_training)
        for layer, top_k in before or ():
            layer.top_k = top_k
    nats, tokens = reduce(total).tolist()
    return nats / tokens / math.log(2)


def load_run(path: str | Path, which: str = "best") -> tuple[TrainConfig, TransformerXL, Checkpoint]:
    """The configuration, the model (on the CPU) and the checkpoint of a run; ``which`` is ``best`` or ``last``.

    Raises ValueError when ``path`` holds no run, CheckpointError when none of its checkpoints can be read.
    """
    folder = RunFolder.existing(path)
    recorded = folder.read_config()
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    if recorded.keys() != names:
        name = sorted(recorded.keys() ^ names)[0]
        has = "has" if name in recorded else "lacks"
        raise ValueError(f"run: {folder.config_path} is not of a Transformer-XL of this version: it {has} {name}")
    config = TrainConfig(**recorded | {"sweep": tuple(recorded["sweep"])})
    latest = load_latest(folder.checkpoints, groups=["model"])
    if latest is None:
        raise CheckpointError(f"run {folder.path} has no checkpoint yet")
    for path, reason in latest.skipped:
        print(f"warning: {path.name} is damaged ({reason}); going by {latest.path.name}", file=sys.stderr)
    checkpoint = latest
    best = latest.state.get("best_step")
    if which == "best" and best is not None and best != latest.step:
        checkpoint = load_checkpoint(folder.checkpoints / f"step-{best:08d}", groups=["model"])
    model = config.build_model()
    model.load_state_dict(checkpoint.tensors["model"])
    return config, model, checkpoint


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m transformer_xl.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("run", help="a run folder of transformer_xl.train")
    parser.add_argument("--k", type=int, nargs="+", help="numbers of activated experts (default: the run's sweep)")
    parser.add_argument("--split", choices=("valid", "test"), default="test")
    parser.add_argument("--data", help="the folder with the splits (default: the run's)")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best")
    parser.add_argument("--tokens", type=int, help="evaluate on this many bytes (default: as the run did; 0: all)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    arguments = parser.parse_args(argv)

    config, model, checkpoint = load_run(arguments.run, arguments.checkpoint)
    if arguments.tokens is not None:
        if arguments.tokens < 0:
            raise ValueError(f"tokens is {arguments.tokens}; it must be 0 (all) or more")
        config = dataclasses.replace(config, eval_tokens=arguments.tokens or None)
    routed = config.get_method().routed
    if arguments.k and not routed:
        raise ValueError(f"k is {arguments.k}; {config.method} is dense and has no experts to choose from")
    ks = [check_top_k(k, config.num_experts) for k in arguments.k] if arguments.k else config.sweep_ks()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    data = load_split(arguments.data or config.data, arguments.split)
    bf16 = precision(config, device) == "bf16"
    result = {}
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for k in ks:
            result[k_name(k)] = evaluate(model, config, data, device, k=k)
            if not arguments.json:
                name = "dense" if k is None else f"k = {k:2}"
                print(f"{name}: {arguments.split} BPC {result[k_name(k)]:.4f}", flush=True)
    if arguments.json:
        report = {"run": str(arguments.run), "step": checkpoint.step, "split": arguments.split, "bpc": result}
        print(json.dumps(report | {"eval_tokens": config.eval_tokens}, indent=2))


def precision(config: TrainConfig, device: torch.device) -> str:
    """``bf16`` or ``fp32``; ``auto`` is bf16 where the device has instructions for it."""
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


if __name__ == "__main__":
    run_main(main)
