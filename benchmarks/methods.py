"""Seconds per training step of every method of Table 1, at scales of the trainers, FLOPs beside them.

    python -m benchmarks.methods [--model transformer_xl] [--scale cpu hour] [--json results/step_times.json]

A step is the method's loss (two passes for THOR), backward, gradient clipping and the optimizer step, on random tokens,
new ones at every step, with the sizes, batch and precision of the scale. All methods take turns within one process, so
that whatever else the machine does affects all alike. k is that of the method's training; where k grows, the row that
counts for training is the mean over the schedule: its ends weigh a quarter each, its middle a half.
`python -m smoe.report --all` shows what `--json` writes to results/step_times.json.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.options import parse, timing_parser, write_record
from benchmarks.step import SHARES, VOCABULARY, Step, measure, training_step
from smoe import set_top_k
from smoe.errors import run_main
from smoe.flops import count_step
from smoe.methods import METHODS
from smoe.train.command import parse_config
from smoe.train.config import TrainConfig

MODELS = ("transformer_xl", "bert", "roberta")
SMALL_VOCABULARY = 1024  # what data/bookcorpus/prepare.py makes below scale paper


@dataclass
class Contender:
    """A method at one k (None: dense): how to run a step, and the FLOPs of one."""

    method: str
    k: int | None
    run: Step
    flops: int


def contenders(model: str, scale: str, method: str, device: str) -> tuple[TrainConfig, list[Contender]]:
    """The method's configuration at the scale, and a contender for each k that its training has at three places."""
    torch.manual_seed(0)
    build = _transformer_xl if model == "transformer_xl" else _masked_lm
    config, network, draw = build(model, scale, method, device)
    weights = {"balance_weight": config.balance_weight, "consistency_weight": config.consistency_weight}

    def loss() -> torch.Tensor:
        batch = draw()
        return config.get_method().loss(network, lambda: network(**batch), **weights).total

    adam = lambda parameters: torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0, fused=True)  # noqa: E731
    step = training_step(network, loss, adam, config.precision, device)
    if not config.get_method().routed:
        ks: list[int | None] = [None]
    else:
        k_min, k_max, _ = config.k_schedule()
        ks = list(dict.fromkeys((k_min, (k_min + k_max) // 2, k_max)))

    def at(k: int | None) -> Contender:
        def run() -> None:
            if k is not None:
                set_top_k(network, k)
            step()

        example = {name: t.to("meta") if isinstance(t, torch.Tensor) else t for name, t in draw().items()}
        return Contender(method, k, run, count_step(network, method, example, k, **weights))

    return config, [at(k) for k in ks]


def rows_of(model: str, scale: str, found: list[Contender], seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One row per contender and, for methods whose k grows, the mean over the schedule. ``as_trained``: whether the row
    is what a step of the method's training takes."""
    rows = []
    for method in dict.fromkeys(contender.method for contender in found):
        own = [contender for contender in found if contender.method == method]
        medians = [statistics.median(seconds[_name(contender)]) for contender in own]
        head = {"model": model, "scale": scale, "method": method}
        for contender, median in zip(own, medians, strict=True):
            cost = {"seconds_per_step": median, "flops_per_step": contender.flops}
            rows.append(
                {**head, "k": contender.k, "as_trained": len(own) == 1, **cost, "seconds": seconds[_name(contender)]}
            )
        if len(own) > 1:
            shares = SHARES if len(own) == len(SHARES) else [1 / len(own)] * len(own)
            cost = {
                "seconds_per_step": sum(share * median for share, median in zip(shares, medians, strict=True)),
                "flops_per_step": round(sum(s * contender.flops for s, contender in zip(shares, own, strict=True))),
            }
            rows.append({**head, "k": f"{own[0].k}..{own[-1].k}", "as_trained": True, **cost})
    return rows


def main() -> None:
    parser = timing_parser(__doc__)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["transformer_xl"])
    scales = "of the trainers' configurations: paper, hour, cpu or smoke"
    parser.add_argument("--scale", nargs="+", default=["cpu"], help=scales)
    options, clock = parse(parser)
    rows = []
    print(f"{'model':<16}{'scale':<7}{'method':<24}{'k':>8}{'median ms':>11}{'GFLOPs':>9}")
    for model, scale in itertools.product(options.model, options.scale):
        found: list[Contender] = []
        for method in METHODS:
            config, own = contenders(model, scale, method, options.device)
            found += own
        steps = {_name(contender): contender.run for contender in found}
        here = rows_of(model, scale, found, measure(steps, options.repeats, clock, options.device))
        rows += [{**row, "precision": config.precision} for row in here]
        for row in here:
            k = "-" if row["k"] is None else row["k"]
            costs = f"{row['seconds_per_step'] * 1e3:>11.1f}{row['flops_per_step'] / 1e9:>9.2f}"
            print(f"{model:<16}{scale:<7}{row['method']:<24}{k:>8}{costs}", flush=True)
        what = "a training step of each method, all taking turns in one process; medians in seconds"
        write_record(options, what, records=rows)


def _name(contender: Contender) -> str:
    return f"{contender.method} {contender.k}"


Built = tuple[TrainConfig, torch.nn.Module, Callable[[], dict[str, Any]]]


def _configuration(config_class: type, scale: str, method: str, **more: str) -> TrainConfig:
    flags = {"method": method, "scale": scale, "run_dir": "none", **more}
    return parse_config(config_class, [f"--{name}={value}" for name, value in flags.items()]).resolved()


def _transformer_xl(_: str, scale: str, method: str, device: str) -> Built:
    from transformer_xl.config import LanguageModelConfig

    c = _configuration(LanguageModelConfig, scale, method)
    network = c.build_model().to(device)
    memory = torch.randn(c.num_layers, c.batch_size, c.mem_len, c.d_model, device=device)

    def draw() -> dict[str, Any]:
        ids, targets = torch.randint(0, 256, (2, c.batch_size, c.tgt_len), device=device)
        return {"input_ids": ids, "targets": targets, "memory": memory, "memory_length": c.mem_len}

    return c, network, draw


def _masked_lm(model: str, scale: str, method: str, device: str) -> Built:
    from bert.config import PretrainConfig
    from bert.data import Vocabulary
    from bert.model import MaskedLM, build_model

    c = _configuration(PretrainConfig, scale, method, model=model)
    size = VOCABULARY[model] if c.scale == "paper" else SMALL_VOCABULARY
    network = MaskedLM(build_model(c, Vocabulary(size, pad=0, mask=1, start=2, end=3, unknown=4))).to(device)
    masked = max(round(c.mask_share * c.seq_len), 1)

    def draw() -> dict[str, Any]:
        shape = (c.batch_size, c.seq_len)
        ids = torch.randint(5, size, shape, device=device)
        positions = torch.rand(shape, device=device).argsort(1)[:, :masked]
        return {"input_ids": ids, "positions": positions, "targets": ids.gather(1, positions)}

    return c, network, draw


if __name__ == "__main__":
    run_main(main)
