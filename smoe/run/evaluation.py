"""A trained run at any number of activated experts: reading it back, measuring it, and the command that does both."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from smoe import set_top_k, smoe_layers
from smoe.errors import CheckpointError, Parser
from smoe.router import check_top_k
from smoe.run.checkpoint import Checkpoint, load_checkpoint, load_latest
from smoe.run.folder import RunFolder
from smoe.run.precision import resolve_precision
from smoe.run.result import k_name
from smoe.run.trainer_config import TrainerConfig

EVALUATION_SEED = 0  # of what a router draws at random when evaluating (THOR)

Config = TypeVar("Config", bound=TrainerConfig)
Measure = Callable[[int | None], float]


@torch.no_grad()
def bits_per_token(
    model: nn.Module,
    losses: Iterable[tuple[Tensor, int]],
    device: torch.device,
    *,
    k: int | None,
    precision: str,
    rank: int = 0,
    reduce: Callable[[Tensor], Tensor] = lambda total: total,
) -> float:
    """The mean loss / ln 2 with k activated experts (None: as the model is, dense).

    The model is back in its mode, at its own k and with its generator where they were.

    Args:
        losses: the mean loss of each pass over this process's share and its number of tokens; a generator, that
            calls ``model`` when asked for the next. Where experts are spread over processes, all must give as many.
        precision: ``bf16`` or ``fp32``.
        reduce: sums a tensor over all processes.
    """
    was_training = model.training
    model.eval()
    before = []
    if k is not None:
        before = [(layer, layer.top_k) for _, layer in smoe_layers(model)]
        set_top_k(model, k)
    total = torch.zeros(2, dtype=torch.float64, device=device)  # nats, tokens
    devices = [device] if device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(devices),
            torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            torch.manual_seed(EVALUATION_SEED + rank)
            for loss, tokens in losses:
                if tokens:  # else a pass for the sake of other processes, without a loss
                    total += torch.stack((loss.double() * tokens, total.new_tensor(tokens)))
    finally:
        model.train(was_training)
        for layer, top_k in before:
            layer.top_k = top_k
    nats, tokens = reduce(total).tolist()
    return nats / tokens / math.log(2)


def recover_run(path: str | Path, which: str, config_class: type[Config], what: str) -> tuple[Config, Checkpoint]:
    """The configuration and the checkpoint of a run; ``which`` is ``best`` or ``last``, ``what`` a model of its kind.

    A field that the run's version did not have yet takes its default. A damaged newest checkpoint is said on stderr.
    Raises ValueError when ``path`` holds no run of this kind, CheckpointError when no checkpoint can be read.
    """
    folder = RunFolder.existing(path)
    config = _read_config(folder, config_class, what)
    latest = load_latest(folder.checkpoints, groups=["model"])
    if latest is None:
        raise CheckpointError(f"run {folder.path} has no checkpoint yet")
    for damaged, reason in latest.skipped:
        print(f"warning: {damaged.name} is damaged ({reason}); going by {latest.path.name}", file=sys.stderr)
    best = latest.state.get("best_step")
    if which == "best" and best is not None and best != latest.step:
        return config, load_checkpoint(folder.checkpoints / f"step-{best:08d}", groups=["model"])
    return config, latest


def _read_config(folder: RunFolder, config_class: type[Config], what: str) -> Config:
    recorded = folder.read_config()
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    unknown = sorted(recorded.keys() - fields.keys())
    missing = [name for name, field in fields.items() if name not in recorded and field.default is dataclasses.MISSING]
    for name in (*unknown, *missing):
        has = "has" if name in recorded else "lacks"
        raise ValueError(f"run: {folder.config_path} is not of {what} of this version: it {has} {name}")
    hints = get_type_hints(config_class)
    values = {
        name: tuple(value) if get_origin(hints[name]) is tuple and isinstance(value, list) else value
        for name, value in recorded.items()
    }
    values["engine"] = "auto"  # the weights are the same with any, and the run's need not be here
    try:
        return config_class(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"run: {folder.config_path} is not of {what}: {error}") from None


def evaluation_command(
    argv: list[str] | None,
    *,
    module: str,
    trainer: str,
    limit: str,
    load_run: Callable[[str, str], tuple[Any, nn.Module, Checkpoint]],
    prepare: Callable[[Any, nn.Module, Checkpoint, str, str, torch.device], Measure],
) -> None:
    """``python -m MODULE RUN [--k ...] [--split ...] [--data ...] [--checkpoint ...] [--LIMIT n] [--json]``.

    Args:
        trainer: the module whose runs it reads.
        limit: of what an evaluation may be cut short, ``tokens`` or ``sequences``: the field ``eval_LIMIT``.
        load_run: (run, best or last) -> configuration, model, checkpoint.
        prepare: (configuration, model, checkpoint, data, split, device) -> what measures the BPC at a k.
    """
    parser = Parser(prog=f"python -m {module}", description="BPC of a finished or stopped run at any k.")
    parser.add_argument("run", help=f"a run folder of {trainer}")
    parser.add_argument("--k", type=int, nargs="+", help="numbers of activated experts (default: the run's sweep)")
    parser.add_argument("--split", choices=("valid", "test"), default="test")
    parser.add_argument("--data", help="the folder with the splits (default: the run's)")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best")
    parser.add_argument(f"--{limit}", type=int, help="evaluate on so many (default: as the run did; 0: all)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    arguments = parser.parse_args(argv)

    config, model, checkpoint = load_run(arguments.run, arguments.checkpoint)
    count = getattr(arguments, limit)
    if count is not None:
        if count < 0:
            raise ValueError(f"{limit} is {count}; it must be 0 (all) or more")
        config = dataclasses.replace(config, **{f"eval_{limit}": count or None})
    if arguments.k and not config.get_method().routed:
        raise ValueError(f"k is {arguments.k}; {config.method} is dense and has no experts to choose from")
    ks = [check_top_k(k, config.num_experts) for k in arguments.k] if arguments.k else config.sweep_ks()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = dataclasses.replace(config, precision=resolve_precision(config.precision, device))
    measure = prepare(config, model.to(device), checkpoint, arguments.data or config.data, arguments.split, device)
    bpc = {}
    for k in ks:
        bpc[k_name(k)] = measure(k)
        if not arguments.json:
            name = "dense" if k is None else f"k = {k:2}"
            print(f"{name}: {arguments.split} BPC {bpc[k_name(k)]:.4f}", flush=True)
    if arguments.json:
        report = {"run": str(arguments.run), "step": checkpoint.step, "split": arguments.split, "bpc": bpc}
        print(json.dumps(report | {f"eval_{limit}": getattr(config, f"eval_{limit}")}, indent=2))
