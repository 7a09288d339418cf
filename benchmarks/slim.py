"""What slimming saves and what it costs: a Transformer-XL run at several numbers of kept experts.

    python -m benchmarks.slim RUN --data data/enwik8 [--keep 16 8 4 2 1] [--json OUT]

Per number of kept experts: parameters, the size of the weights as a file, the most memory that an evaluation pass needs
(weights included), FLOPs and milliseconds of a pass with all kept experts active, and bits per byte on the test split:
before slimming, where the whole model activates as many of its N experts, and after it, for each score that experts are
voted by. Nothing is fine-tuned. All models take turns, so that whatever else the machine does affects all alike.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Callable

import torch

from benchmarks.layer import peak_bytes
from benchmarks.options import parse, timing_parser, write_record
from benchmarks.step import measure as time_in_turns
from smoe import set_top_k
from smoe.errors import run_main
from smoe.slim import VOTE_SCORES
from smoe.train.evaluate import load_task, read_run
from smoe.train.evaluation import measure
from smoe.train.processes import Processes
from smoe.train.slimming import slim_task
from transformer_xl.config import LanguageModelConfig
from transformer_xl.cost import evaluation_flops
from transformer_xl.model import TransformerXL
from transformer_xl.train import LanguageModel

MEGABYTE = 1e6


def evaluation_pass(model: TransformerXL, config: LanguageModelConfig, device: torch.device) -> Callable[[], None]:
    """A function that runs one evaluation pass, its memory full."""
    torch.manual_seed(0)
    batch, length, remembered = config.eval_batch_size, config.eval_tgt_len, config.eval_mem_len
    ids = torch.randint(0, 256, (batch, length), device=device)
    memory = torch.randn(config.num_layers, batch, remembered, config.d_model, device=device)

    @torch.no_grad()
    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            model(ids, None, memory, remembered)

    return run


def at_k(model: TransformerXL, run: Callable[[], None], k: int) -> Callable[[], None]:
    """``run`` with k activated experts of ``model``."""
    return lambda: (set_top_k(model, k), run())[1]


def slimmed(task: LanguageModel, keep: int, score: str, batches: int, processes: Processes) -> LanguageModel:
    """A copy of the task whose model has the ``keep`` experts that its training data vote for."""
    other = copy.copy(task)
    other.model, other.memory = copy.deepcopy(task.model), None
    slim_task(other, keep, batches=batches, device=processes.device, score=score)
    return other


def row_of(task: LanguageModel, keep: int, batches: int, processes: Processes) -> tuple[dict, TransformerXL]:
    """Everything but the times at one number of kept experts, and the slimmed model."""
    from safetensors.torch import save

    c, bpc = task.config, {"whole, k = keep": measure(task, "test", keep, processes).values["bpc"]}
    for score in reversed(VOTE_SCORES):  # the model that is timed is that of the first one
        other = slimmed(task, keep, score, batches, processes)
        bpc[score] = measure(other, "test", keep, processes).values["bpc"]
    set_top_k(other.model, keep)
    sizes = {"batch": c.eval_batch_size, "tgt_len": c.eval_tgt_len, "mem_len": c.eval_mem_len}
    flops = evaluation_flops(other.model, keep, **sizes)
    peak = peak_bytes(evaluation_pass(other.model.eval(), c, processes.device)) + flops["weight_bytes"]
    file = len(save({name: tensor.cpu().contiguous() for name, tensor in other.model.state_dict().items()}))
    row = {"keep": keep, "parameters": flops["params_total"], "file_mb": file / MEGABYTE, "peak_mb": peak / MEGABYTE}
    return {**row, "flops": flops["true"], "bpc": bpc}, other.model


def table(rows: list[dict]) -> str:
    """The rows of a record in Markdown."""
    columns = ["kept", "parameters", "file, MB", "peak, MB", "GFLOPs", "ms", "ms, whole"]
    columns += [f"bits, {name}" for name in ("whole", *VOTE_SCORES)]
    lines = [f"| {' | '.join(columns)} |", "|" + " ---: |" * len(columns)]
    for row in rows:
        cells = [row["keep"], f"{row['parameters']:,}", f"{row['file_mb']:.2f}", f"{row['peak_mb']:.1f}"]
        cells += [f"{row['flops'] / 1e9:.2f}", f"{row['ms_slimmed']:.0f}", f"{row['ms_whole']:.0f}"]
        cells += [f"{row['bpc'][name]:.3f}" for name in ("whole, k = keep", *VOTE_SCORES)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = timing_parser(__doc__)
    parser.add_argument("run", help="a run folder of the Transformer-XL")
    parser.add_argument("--data", help="the folder with the splits (default: the run's)")
    parser.add_argument("--keep", type=int, nargs="+", default=[16, 8, 4, 2, 1])
    parser.add_argument("--batches", type=int, default=64, help="training batches that vote")
    options, clock = parse(parser, keep=None, batches=None)

    config, checkpoint = read_run(options.run, LanguageModelConfig, "a Transformer-XL")
    if options.data is not None:
        config = dataclasses.replace(config, data=options.data)
    if max(options.keep) > config.num_experts:
        raise ValueError(f"--keep is {max(options.keep)}; it must be at most {config.num_experts}")
    processes = Processes()
    task = load_task(LanguageModel, config, checkpoint, processes)
    task.model.eval()
    whole = evaluation_pass(task.model, task.config, processes.device)
    rows, passes = [], {}
    for keep in options.keep:
        row, model = row_of(task, keep, options.batches, processes)
        rows.append(row)
        passes[f"{keep} slimmed"] = evaluation_pass(model, task.config, processes.device)
        passes[f"{keep} whole"] = at_k(task.model, whole, keep)
        print(f"keep {keep}: " + ", ".join(f"{name} {bits:.3f}" for name, bits in row["bpc"].items()), flush=True)
    seconds = time_in_turns(passes, options.repeats, clock, options.device)
    for row in rows:
        for kind in ("slimmed", "whole"):
            row[f"ms_{kind}"] = statistics.median(seconds[f"{row['keep']} {kind}"]) * 1e3
    print(table(rows))
    what = "slimming: an evaluation pass of a Transformer-XL over kept experts, all active; medians of passes in turns"
    about = {"scale": config.scale, "precision": task.config.precision, "output_scale": config.output_scale}
    about |= {"method": config.method, "num_experts": config.num_experts, "step": checkpoint.step}
    about |= {"batches": options.batches, "repeats": options.repeats, "dataset": task.dataset}
    about["tokens"] = {"batch": config.eval_batch_size, "tgt_len": config.eval_tgt_len, "mem_len": config.eval_mem_len}
    write_record(options, what, run=about, rows=rows)


if __name__ == "__main__":
    run_main(main)
