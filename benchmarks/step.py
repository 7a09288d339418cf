"""Time a training step at the paper's model sizes: dense and SMoE-Dropout over its k, and a reference implementation.

    python -m benchmarks.step [--model transformer_xl bert roberta] [--precision bf16 fp32] [--json OUT]
    python -m benchmarks.step --model transformer_xl --batch 22 --length 512  # the paper's batch
    python -m benchmarks.step --model transformer_xl --reference CHECKOUT     # of github.com/kimiyoung/transformer-xl

A step is forward, backward, gradient clipping and the optimizer step, on random tokens; Transformer-XL has a memory as
long as its segment. All variants take turns within one run, so that whatever else the machine does affects all alike:
compare ratios, not seconds of two runs. Every time has the FLOPs of the step beside it (``smoe.flops``). "k = 8..16" is
the mean over the schedule, in which k grows linearly: k = 8 and 16 weigh a quarter each, k = 12 a half.
On a busy machine use `--threads 1 --clock cpu`, which counts processor time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.options import parse, timing_parser, write_record
from benchmarks.transformer_xl_reference import build_reference, run_reference
from smoe import set_top_k
from smoe.errors import run_main
from smoe.flops import count_step
from transformer_xl.config import LanguageModelConfig
from transformer_xl.cost import meta_inputs

MODELS = ("transformer_xl", "bert", "roberta")
BATCH, LENGTH = 8, 128  # Transformer-XL; defaults of --batch and --length
SEQUENCES, SEQUENCE = 8, 512  # BERT and RoBERTa: what one of the paper's 8 GPUs gets
VOCABULARY = {"bert": 30522, "roberta": 50265}
TOP_KS = (8, 12, 16)
SHARES = (0.25, 0.5, 0.25)  # of the schedule, by the trapezoidal rule
DROPOUTS = [0.0, 0.1]
SCHEDULE = "k = 8..16"

Step = Callable[[], None]


def training_step(
    model: nn.Module, loss_of: Callable[[], Tensor], optimizer: type, precision: str, device: str
) -> Step:
    """A function that runs one training step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer(parameters)

    def run() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 0.25)
        optimizer.step()
        optimizer.zero_grad()

    return run


def transformer_xl(batch: int, length: int, method: str, dropout: float, device: str) -> tuple:
    """(model, its loss on one batch, optimizer, FLOPs of a step at k)."""
    rates = {"dropout": dropout} | ({"expert_dropout": dropout} if method == "smoe_dropout" else {})
    config = LanguageModelConfig(method=method, run_dir="", batch_size=batch, **rates)
    torch.manual_seed(0)
    model = config.build_model().to(device)
    ids, targets = torch.randint(0, 256, (2, batch, length), device=device)
    memory = torch.randn(config.num_layers, batch, length, config.d_model, device=device)

    def flops(k: int | None) -> int:
        return count_step(model, method, meta_inputs(model, batch, length, length), k)

    adam = lambda parameters: torch.optim.Adam(parameters, lr=2.5e-4, fused=True)  # noqa: E731
    return model, lambda: model(ids, targets, memory, length).loss, adam, flops


def masked_lm(name: str, method: str, dropout: float, device: str) -> tuple:
    """The same for BERT and RoBERTa."""
    from bert.config import PretrainConfig
    from bert.data import Vocabulary
    from bert.model import MaskedLM, build_model

    config = PretrainConfig(model=name, method=method, run_dir="", dropout=dropout, attention_dropout=dropout)
    torch.manual_seed(0)
    vocabulary = Vocabulary(VOCABULARY[name], pad=0, mask=1, start=2, end=3, unknown=4)
    model = MaskedLM(build_model(config, vocabulary)).to(device)
    masked = round(config.mask_share * SEQUENCE)
    inputs = {"input_ids": torch.randint(5, vocabulary.size, (SEQUENCES, SEQUENCE), device=device)}
    inputs["positions"] = torch.rand(SEQUENCES, SEQUENCE, device=device).argsort(1)[:, :masked]
    inputs["targets"] = torch.randint(5, vocabulary.size, (SEQUENCES, masked), device=device)

    def flops(k: int | None) -> int:
        return count_step(model, method, {n: t.to("meta") for n, t in inputs.items()}, k)

    adam = lambda parameters: torch.optim.AdamW(parameters, lr=5e-5, weight_decay=0.0, fused=True)  # noqa: E731
    return model, lambda: model(**inputs).loss, adam, flops


def variants(
    build: Callable[..., tuple], precision: str, device: str, dropouts: list[float]
) -> tuple[dict[str, Step], dict[str, int]]:
    """Steps and their FLOPs, by name. All k of one dropout rate share one model."""
    steps, flops = {}, {}
    for dropout in dropouts:
        for method in ("dense_dropout", "smoe_dropout"):
            model, loss_of, optimizer, count = build(method, dropout, device)
            run = training_step(model, loss_of, optimizer, precision, device)
            if method == "dense_dropout":
                steps[f"dense, dropout {dropout}"], flops[f"dense, dropout {dropout}"] = run, count(None)
                continue
            for k in TOP_KS:
                label = f"SMoE, k = {k}, dropout {dropout}"
                steps[label] = lambda model=model, run=run, k=k: (set_top_k(model, k), run())[1]
                flops[label] = count(k)
    return steps, flops


def reference(checkout: str, batch: int, length: int, precision: str, dropout: float) -> Step:
    """A step of the dense Transformer-XL of the reference implementation, with the same sizes."""
    c = LanguageModelConfig(method="dense_dropout", run_dir="", dropout=dropout).sizes()
    torch.manual_seed(0)
    sizes = {name: getattr(c, name) for name in ("vocab_size", "num_layers", "d_model", "num_heads", "d_head")}
    model = build_reference(
        checkout, **sizes, d_hidden=c.d_hidden, dropout=dropout, length=length, memory_length=length
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, c.init_std)
    ids, targets = torch.randint(0, c.vocab_size, (2, length, batch))
    memories = [torch.randn(length, batch, c.d_model) for _ in range(c.num_layers + 1)]
    # Not fused, unlike ours: its own training script takes this one.
    adam = lambda parameters: torch.optim.Adam(parameters, lr=2.5e-4)  # noqa: E731
    return training_step(model, lambda: run_reference(model, ids, targets, *memories)[0].mean(), adam, precision, "cpu")


def measure(steps: dict[str, Step], repeats: int, clock: Callable[[], float], device: str) -> dict[str, list[float]]:
    """Seconds of `repeats` runs of each step by `clock`; steps take turns, and two warm-up runs of each don't count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for repeat in range(-2, repeats):
        for name, step in steps.items():
            wait()
            start = clock()
            step()
            wait()
            if repeat >= 0:
                seconds[name].append(clock() - start)
    return seconds


def rows_of(
    model: str, precision: str, seconds: dict[str, list[float]], flops: dict[str, int], dropouts: list[float]
) -> list[dict]:
    """One row per variant, and one per dropout rate for the mean over the schedule."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for dropout in dropouts:
        names = [f"SMoE, k = {k}, dropout {dropout}" for k in TOP_KS]
        mean = f"SMoE, {SCHEDULE}, dropout {dropout}"
        medians[mean] = sum(share * medians[name] for share, name in zip(SHARES, names, strict=True))
        flops[mean] = round(sum(share * flops[name] for share, name in zip(SHARES, names, strict=True)))
    rows = []
    for name, median in medians.items():
        row = {"model": model, "precision": precision, "variant": name, "median_s": median, "flops": flops.get(name)}
        dropout = name.rpartition(" ")[2]
        for other in ("dense", "reference"):
            beside = medians.get(f"{other}, dropout {dropout}")
            row[f"time_over_{other}"] = beside and median / beside
        dense = flops[f"dense, dropout {dropout}"]
        row["flops_over_dense"] = row["flops"] and row["flops"] / dense
        rows.append(row | ({"seconds": seconds[name]} if name in seconds else {}))
    return rows


HEADER = f"{'model':<16}{'':<6}{'variant':<30}{'median ms':>10}{'x dense':>9}{'FLOPs':>8}{'x reference':>13}"


def _line(row: dict) -> str:
    def number(value: float | None, width: int) -> str:
        return f"{'-':>{width}}" if value is None else f"{value:>{width}.3f}"

    ratios = number(row["time_over_dense"], 9) + number(row["flops_over_dense"], 8)
    ratios += number(row["time_over_reference"], 13)
    return f"{row['model']:<16}{row['precision']:<6}{row['variant']:<30}{row['median_s'] * 1e3:>10.0f}{ratios}"


def main() -> None:
    parser = timing_parser(__doc__)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--precision", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    parser.add_argument("--batch", type=int, default=BATCH, help="sequences of the Transformer-XL")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of each")
    parser.add_argument("--dropout", nargs="+", type=float, default=DROPOUTS)
    parser.add_argument("--reference", help="checkout of github.com/kimiyoung/transformer-xl to compare with")
    options, clock = parse(parser, batch=None, length=None)

    rows = []
    print(HEADER)
    for model in options.model:
        for precision in options.precision:
            size = (options.batch, options.length)
            build = partial(transformer_xl, *size) if model == "transformer_xl" else partial(masked_lm, model)
            steps, flops = variants(build, precision, options.device, options.dropout)
            if options.reference and model == "transformer_xl":
                steps |= {
                    f"reference, dropout {p}": reference(options.reference, *size, precision, p)
                    for p in options.dropout
                }
            seconds = measure(steps, options.repeats, clock, options.device)
            rows += rows_of(model, precision, seconds, flops, options.dropout)
            del steps
            here = [row for row in rows if (row["model"], row["precision"]) == (model, precision)]
            print("\n".join(map(_line, here)), flush=True)
            what = f"training step: transformer_xl {options.batch} x {options.length} tokens; bert and roberta "
            what += f"{SEQUENCES} x {SEQUENCE} tokens; medians in seconds, ratios of medians"
            write_record(options, what, rows=rows)


if __name__ == "__main__":
    run_main(main)
