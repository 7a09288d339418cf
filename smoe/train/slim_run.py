"""The command that makes a run folder of a run with fewer experts, those that its training data vote for.

python -m transformer_xl.slim RUN --keep 8 --out DIR [--data DIR] [--score count|weight|reap] [--k K] [--batches 64]

DIR has ``config.yaml`` with the N and the MLP width that are left, one checkpoint of the weights alone, a tokenizer if
the run has one, and ``votes.json``. It is evaluated, exported and fine-tuned like any other run; its training is over.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from smoe.errors import Parser
from smoe.files import write_atomic
from smoe.new_folder import new_folder
from smoe.slim_options import add_slim_options, check_slim_options
from smoe.train.checkpoint import save_checkpoint
from smoe.train.config import to_dict
from smoe.train.evaluate import load_task, read_task
from smoe.train.finetune import FineTuneTask
from smoe.train.processes import Processes
from smoe.train.resume import read_config
from smoe.train.slimming import slim_task, slimmed_fields
from smoe.train.task import Task
from smoe.yaml_files import to_yaml

_TOKENIZER = "tokenizer.json"


def slim_command(*tasks: type[Task], prog: str, what: str, argv: Sequence[str] | None = None) -> None:
    """``python -m MODULE RUN --keep N --out DIR ...``.

    Args: as those of :func:`smoe.train.evaluate.evaluation_command`.
    """
    description = "Writes a run with the experts of RUN that its training data vote for; it is smaller and faster."
    parser = Parser(prog=prog, description=description)
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--data", help="the folder whose training data vote (default: the run's)")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best")
    add_slim_options(parser)
    options = parser.parse_args(argv)

    task_class, config, checkpoint = read_task(options.run, tasks, what, options.checkpoint)
    slimmed = dataclasses.replace(config, **slimmed_fields(to_dict(config), options.keep, options.run))
    check_slim_options(options, config.num_experts)
    with new_folder(options.out, "out") as folder:
        processes = Processes()
        here = config if options.data is None else dataclasses.replace(config, data=options.data)
        task = load_task(task_class, here, checkpoint, processes)
        size = sum(p.numel() for p in task.model.parameters())
        torch.manual_seed(config.seed)  # of what a router draws at random (THOR)
        mask = task.token_mask if isinstance(task, FineTuneTask) else None
        k = options.keep if options.k is None else options.k
        voted = {"score": options.score, "k": k, "batches": options.batches}
        votes = slim_task(task, options.keep, **voted, token_mask=mask, device=processes.device)

        written = to_dict(dataclasses.replace(slimmed, run_dir=str(options.out)))
        # What loading a run leaves out: whose weights they were.
        written |= {name: value for name, value in read_config(options.run).items() if name == "start_from"}
        write_atomic(folder / "config.yaml", to_yaml(written))
        # Nothing has been measured yet; and a training refuses to resume from the mark.
        state = checkpoint.state | {"progress": checkpoint.state["progress"] | {"best": {}}}
        state["config"] = to_dict(slimmed) | {"slimmed": True}
        # For the record of what is fine-tuned from it; slimmed again, it is still a part of the first one.
        whole = {"num_experts": config.num_experts, "k_schedule": list(config.k_schedule())}
        state["slimmed_from"] = checkpoint.state.get("slimmed_from", whole)
        save_checkpoint(folder / "checkpoints", checkpoint.step, {"model": task.bare().state_dict()}, state)
        tokenizer = Path(options.run) / _TOKENIZER
        if tokenizer.is_file():
            shutil.copyfile(tokenizer, folder / _TOKENIZER)
        told = {"keep": options.keep, **voted, "dataset": task.dataset}
        told["votes"] = {name: scores.tolist() for name, scores in votes.items()}
        write_atomic(folder / "votes.json", json.dumps(told) + "\n")
    left = sum(p.numel() for p in task.model.parameters())
    print(f"{options.keep} of {config.num_experts} experts per layer, {size:,} -> {left:,} parameters: {options.out}")
