"""Times fine-tuned BERTs and RoBERTas over their experts: dense, slimmed, and at every k.

    python -m benchmarks.encoder RUN [RUN ...] [--json results/encoder_times.json]

RUN is a run folder of a fine-tuning, such as those of script/pretrained/. A time is that of the split that the run
reports, as the run evaluates it: with all experts, and of a run that has kept all of them also with the fewer that its
sweep has. All models take turns, so that whatever else the machine does affects all alike. The report shows these
times; of several runs that differ only in their seed or fold give one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import save

from benchmarks.options import medians, parse, timing_parser, write_record
from bert.classify import Classification
from bert.finetune import FineTuning
from bert.math_word_problems import MathWordProblems
from bert.multiple_choice import MultipleChoice
from bert.question_answering import QuestionAnswering
from smoe import set_top_k
from smoe.errors import run_main
from smoe.report.records import read_result
from smoe.train.evaluate import load_task, read_task
from smoe.train.processes import Processes

TASKS = (Classification, MultipleChoice, MathWordProblems, QuestionAnswering)


def evaluation(task: FineTuning, k: int | None, device: torch.device) -> Callable[[Any], None]:
    """A function that evaluates the split that is reported at k."""

    @torch.no_grad()
    def run(_: Any) -> None:
        if k is not None:
            set_top_k(task.model, k)
        with torch.autocast(device.type, torch.bfloat16, enabled=task.config.precision == "bf16"):
            for _ in task.passes(task.model, task.reported_split(), device):
                pass

    return run


def rows_of(task: FineTuning, run: str) -> list[dict[str, Any]]:
    """A row per number of activated experts, without its time."""
    config, pretrained = task.config, read_result(run).get("pretrained") or {}
    experts = config.num_experts if config.get_method().routed else None
    weights = {name: tensor.detach().cpu().float().contiguous() for name, tensor in task.model.state_dict().items()}
    row = {"encoder": pretrained.get("start_from") or config.model, "dataset": task.dataset["name"]}
    row |= {"scale": config.scale, "method": config.method, "experts": experts, "megabytes": len(save(weights)) / 1e6}
    ks = [experts] if "vote" in pretrained else config.sweep_ks()
    return [row | {"k": k} for k in ks]


def main() -> None:
    parser = timing_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of fine-tunings")
    parser.add_argument("--data", help="the folder with the splits (default: the runs')")
    options, clock = parse(parser)

    processes, device, rows, passes = Processes(), torch.device(options.device), [], {}
    for run in options.runs:
        task_class, config, checkpoint = read_task(run, TASKS, "a fine-tuned BERT or RoBERTa")
        if options.data is not None:
            config = dataclasses.replace(config, data=options.data)
        task = load_task(task_class, config, checkpoint, processes)
        task.model.to(device).eval()
        examples = len(task.data[task.reported_split()])
        for row in rows_of(task, run):
            passes[str(len(rows))] = evaluation(task, row["k"], device)
            rows.append(row | {"examples": examples, "seed": config.seed})
    seconds = medians(passes, None, options.repeats, clock)
    for number, row in enumerate(rows):
        row["milliseconds"] = 1e3 * seconds[str(number)] / row["examples"]
        k = "dense" if row["k"] is None else f"k = {row['k']} of {row['experts']}"
        place = f"{row['encoder']}, {row['dataset']}, {row['method']}, {k}"
        print(f"{place}: {row['milliseconds']:.2f} ms per example, {row['megabytes']:.1f} MB")
    what = "evaluation of fine-tuned encoders over their experts; medians of passes in turns"
    write_record(options, what, repeats=options.repeats, records=rows)


if __name__ == "__main__":
    run_main(main)
