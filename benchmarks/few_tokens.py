"""Few tokens without gradients on a CPU: a dense model beside the same model cut into 16 experts, at every k.

    python -m benchmarks.few_tokens [--models minilm gpt2] [--threads 1] [--json results/few_tokens.json]

Encoder of MiniLM's size (6 layers, d 384, H 1536) and decoder of GPT-2's (12 layers, d 768, H 3072), with random
weights and ``score="sum"``, one row of 1, 8, 24 or 64 tokens; the whole model, and its MLPs alone, one after the other
on one input, with one thread and with two. Contenders take turns in a random order, with a new input each time, the
same for all. One line per record: medians as ratios to dense. The targets: 1.05 at every k for models, and 0.5 at 1
token and k = 4 for MLPs. ``--clock cpu`` holds for one thread; with more it is the wall's, since threads that wait for
one another take processor time too.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import smoe
from benchmarks.options import parse, timing_parser, write_record
from smoe.control import smoe_layers
from smoe.errors import run_main

NUM_EXPERTS = 16
KS = (1, 2, 4, 8, 16)
VOCABULARY = 1000
MODELS = ("minilm", "gpt2")
PARTS = ("model", "MLPs")


def build(name: str, num_layers: int | None = None, d_model: int | None = None) -> nn.Module:
    """The dense model, with random weights; other sizes than its own for tests."""
    from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

    torch.manual_seed(0)
    if name == "minilm":
        d, layers = d_model or 384, num_layers or 6
        sizes = {"hidden_size": d, "num_hidden_layers": layers, "intermediate_size": 4 * d, "num_attention_heads": 12}
        return BertModel(BertConfig(vocab_size=VOCABULARY, **sizes), add_pooling_layer=False).eval()
    sizes = {
        "n_embd": d_model or 768,
        "n_layer": num_layers or 12,
        "n_head": 12,
        "n_positions": 128,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    # Not GPT-2's own "gelu_new", which takes eight operators: experts compute both as one.
    options = {"activation_function": "gelu_pytorch_tanh", "use_cache": False}
    return GPT2Model(GPT2Config(vocab_size=VOCABULARY, **sizes, **options)).eval()


def dense_mlps(model: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    """The MLPs of a dense model, without residuals and norms."""
    if hasattr(model, "encoder"):
        return [lambda x, layer=layer: layer.output.dense(layer.intermediate(x)) for layer in model.encoder.layer]
    return [block.mlp for block in model.h]


def contenders(dense: nn.Module, experts: nn.Module, part: str) -> dict[str, Callable[[Tensor], None]]:
    """name -> what runs one pass: over ids (1, T) for the model, over x (1, T, d) for the MLPs."""

    def every(layers: list[Callable[[Tensor], Tensor]], x: Tensor) -> None:
        for layer in layers:
            layer(x)

    if part == "model":
        run_dense, run_experts = dense, experts
    else:
        layers, dense_layers = [layer for _, layer in smoe_layers(experts)], dense_mlps(dense)
        run_dense, run_experts = (lambda x: every(dense_layers, x)), (lambda x: every(layers, x))
    return {"dense": run_dense} | dict.fromkeys([f"k={k}" for k in KS], run_experts)


@torch.no_grad()
def measure(dense: nn.Module, experts: nn.Module, part: str, tokens: int, repeats: int, clock) -> dict:
    """One record: median seconds of a pass by contender, and their ratios to dense."""
    runs, turns = contenders(dense, experts, part), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(-2, repeats):
        ids = torch.randint(0, VOCABULARY, (1, tokens))
        x = ids if part == "model" else torch.randn(1, tokens, dense.config.hidden_size)
        for name in turns.sample(list(runs), len(runs)):
            if name != "dense":
                smoe.set_top_k(experts, int(name.removeprefix("k=")))
            start = clock()
            runs[name](x)
            if repeat >= 0:  # the first two warm up
                seconds[name].append(clock() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {name: round(median / medians["dense"], 3) for name, median in medians.items()}
    return {"median_s": {name: round(s, 7) for name, s in medians.items()}, "ratio_to_dense": ratios}


def table(records: list[dict]) -> str:
    """The records as Markdown: ratios to dense, one row per model, part and number of threads and tokens."""
    lines = ["| model | part | threads | tokens | " + " | ".join(f"k = {k}" for k in KS) + " |"]
    lines.append("|---" * (4 + len(KS)) + "|")
    for r in records:
        cells = [r["model"], r["part"], str(r["threads"]), str(r["tokens"])]
        cells += [f"{r['ratio_to_dense'][f'k={k}']:.2f}" for k in KS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = timing_parser(__doc__)
    parser.set_defaults(repeats=15)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 24, 64])
    options, clock = parse(parser, tokens=64)
    if options.device != "cpu":
        raise ValueError(f"--device is {options.device}; few tokens have a path of their own on the CPU alone")
    records: list[dict] = []
    for threads in [options.threads] if options.threads else [1, 2]:
        torch.set_num_threads(threads)
        for name in options.models:
            dense = build(name)
            experts = smoe.modulize(copy.deepcopy(dense), NUM_EXPERTS, score="sum", seed=0)
            for part in PARTS:
                for tokens in options.tokens:
                    record = {"model": name, "part": part, "threads": threads, "tokens": tokens}
                    record |= {"repeats": options.repeats, "clock": options.clock if threads == 1 else "wall"}
                    own_clock = clock if threads == 1 else time.perf_counter
                    records.append(record | measure(dense, experts, part, tokens, options.repeats, own_clock))
                    print(table(records[-1:]).splitlines()[-1], flush=True)
                    write_record(options, "time at few tokens, seconds; ratios to the dense model", records=records)


if __name__ == "__main__":
    run_main(main)
