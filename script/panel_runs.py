"""The runs of a table or figure: what its runs.yaml lists, with the flags of the command line. For script/panel.py."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script of a checkout: `data` is not installed


@dataclass(frozen=True)
class Run:
    """One training: ``script/NAME.sh`` called with ``flags``, whose trainer gets ``all_flags``."""

    name: str
    flags: tuple[str, ...]
    all_flags: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return ROOT / self.all_flags[self.all_flags.index("--run_dir") + 1]

    @property
    def result(self) -> Path:
        return self.folder / "result.json"

    @property
    def log(self) -> Path:
        return self.folder / "output.log"

    def __str__(self) -> str:
        return shlex.join([self.name, *self.flags])

    def seconds(self) -> float | None:
        """Training and sweep of the newest finished run that differs at most in its seed; None if there is none."""
        name = re.escape(self.folder.name)
        if "--seed" in self.flags:
            seed = self.flags[self.flags.index("--seed") + 1]
            name = re.sub(rf"seed\\-{seed}(?!\d)", r"seed\\-\\d+", name)
        results = [path for path in self.folder.parent.glob("*/result.json") if re.fullmatch(name, path.parent.name)]
        if not results:
            return None
        spent = json.loads(max(results, key=lambda path: path.stat().st_mtime).read_text(encoding="utf-8"))["seconds"]
        return spent["training"] + spent["sweep"]


def read_panels(figure: str) -> dict[str, list[str]]:
    """By panel: the lines of the figure's runs.yaml, each a script and flags; one with {a,b} is two lines."""
    panels = yaml.safe_load((ROOT / "script" / figure / "runs.yaml").read_text(encoding="utf-8"))
    return {panel: [line for lines in written for line in expanded(lines)] for panel, written in panels.items()}


def expanded(line: str) -> list[str]:
    """The lines that a line with braces stands for, as the shell expands ``{a,b}``."""
    before, brace, rest = line.partition("{")
    if not brace:
        return [line]
    choices, _, after = rest.partition("}")
    return [f"{before}{choice}{tail}" for choice in choices.split(",") for tail in expanded(after)]


def trainer_flags(name: str, flags: Sequence[str]) -> tuple[str, ...]:
    """What the trainer gets when ``script/NAME.sh`` is called with ``flags``. ValueError: the script refuses them."""
    command = ["bash", str(ROOT / "script" / f"{name}.sh"), *flags]
    done = subprocess.run(command, env={**os.environ, "SHOW_FLAGS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip().removeprefix("error: "))
    return tuple(done.stdout.splitlines())


def chosen_runs(options: argparse.Namespace, more: Sequence[str]) -> list[Run]:
    """The runs that the command line asks for, each once: all of the first seed, then all of the next."""
    panels = read_panels(options.figure)
    if unknown := [panel for panel in options.panel or () if panel not in panels]:
        raise ValueError(f"--panel: {unknown[0]!r}, expected one of {', '.join(panels)}")
    lines = [shlex.split(line) for panel in options.panel or panels for line in panels[panel]]
    for pattern in options.only or ():
        if not any(_is_called(name, pattern) for name, *_ in lines):
            names = ", ".join(dict.fromkeys(name for name, *_ in lines))
            raise ValueError(f"--only: {pattern!r} is none of {names}")
    scale = [] if options.scale is None else ["--scale", options.scale]
    runs: dict[Path, Run] = {}
    for seed in options.seeds or [None]:
        for name, *own in lines:
            if options.only and not any(_is_called(name, pattern) for pattern in options.only):
                continue
            flags = (*own, *scale, *([] if seed is None else ["--seed", str(seed)]), *more)
            run = Run(name, flags, trainer_flags(name, flags))
            runs.setdefault(run.folder, run)
    return list(runs.values())


def _is_called(name: str, pattern: str) -> bool:
    """Whether a run's name, or its part behind the folder, is ``pattern``, which may have ``*``."""
    return fnmatch(name, pattern) or fnmatch(name.rpartition("/")[2], pattern)


def config_class(run: Run) -> type:
    """The configuration of the run's trainer."""
    figure, task, *_ = run.name.split("/")
    if figure == "table3":
        from transformer_xl.distil import DistilConfig as Config
    elif figure == "tablea5" or (figure, task) == ("table2", "sst2"):
        from transformer_xl.classify import ClassifyConfig as Config
    elif (figure, task) == ("pretrained", "sst2"):
        from bert.classify import ClassifyConfig as Config
    elif figure == "tablea6":
        from bert.question_answering import QuestionAnsweringConfig as Config
    elif (figure, task) in (("table1", "bert"), ("table1", "roberta")):
        from bert.config import PretrainConfig as Config
    elif figure not in ("table2", "pretrained"):
        from transformer_xl.config import LanguageModelConfig as Config
    elif task == "csqa":
        from bert.multiple_choice import MultipleChoiceConfig as Config
    else:
        from bert.math_word_problems import MathConfig as Config
    return Config


def given_flags(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The flags of a command line in order, by name without dashes, with their values."""
    flags: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags.append((name.replace("-", "_"), [value] if equals else []))
        elif flags:
            flags[-1][1].append(word)
    return flags


def other_source(run: Run) -> str | None:
    """What a finished run was trained on, in words, where its flags say something else than that; else None.

    Its folder names neither the text of a BERT or RoBERTa (--source) nor that of an adapted encoder (--text), and of
    the encoder (--start_from) the name alone.
    """
    flags, trained, text = given_flags(run.flags), run.folder, "source"
    if run.name.startswith("pretrained/"):  # a task: its text is that of the run that it starts from
        trained, text = ROOT / dict(given_flags(run.all_flags))["run"][0], "text"
    elif config_class(run).__name__ != "PretrainConfig":
        return None
    if not (trained / "result.json").is_file():
        return None
    encoder = [ROOT / value for name, values in flags for value in values if name == "start_from"]
    if encoder:
        from smoe.yaml_files import load_yaml

        before = load_yaml(trained / "config.yaml").get("start_from")
        if before is not None and Path(before).resolve() != encoder[-1].resolve():
            return f"starts from the encoder in {before}, not from that of --start_from"
    sources = [ROOT / value for name, values in flags for value in values if name == text]
    if not sources:
        return None
    from data.bookcorpus.corpus import from_files, text_files  # as data/bookcorpus/prepare.py reads them

    dataset = json.loads((trained / "result.json").read_text(encoding="utf-8"))["dataset"]
    if dataset.get("origin") == json.loads(json.dumps(from_files(text_files(sources)[0], "").origin)):
        return None
    return f"is a run on other text than --{text} names"
