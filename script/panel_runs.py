"""The runs of a table or figure: what its runs.yaml lists, with the flags of the command line. For script/panel.py.

The scripts call it too, before they prepare data or train what they start from:

    python script/panel_runs.py flags TRAINER FLAG ...    # would TRAINER, such as bert.classify, take these flags?
    python script/panel_runs.py start RUN ENCODER TEXT    # does RUN start from the encoder in that folder, and was it
                                                          # trained on TEXT? An empty word asks nothing

If not, it ends with a line and exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("source", "subquestions", "start_from", "text")  # flags that name a file or folder of the user's
sys.path.insert(0, str(ROOT))  # a script of a checkout: `data` is not installed

CONFIGS = {
    "transformer_xl.train": "LanguageModelConfig",
    "transformer_xl.classify": "ClassifyConfig",
    "transformer_xl.distil": "DistilConfig",
    "bert.pretrain": "PretrainConfig",
    "bert.classify": "ClassifyConfig",
    "bert.multiple_choice": "MultipleChoiceConfig",
    "bert.math_word_problems": "MathConfig",
    "bert.question_answering": "QuestionAnsweringConfig",
}


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

    @property
    def starts_from(self) -> Path | None:
        """The run that it starts from or learns from, which its script trains first if it is missing; None: neither."""
        given = dict(given_flags(self.all_flags))
        run = given.get("run") or given.get("teacher")
        return None if run is None else ROOT / run[0]

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
    done = subprocess.run(command, env={**os.environ, "SHOW_FLAGS": "1"}, capture_output=True, text=True, cwd=ROOT)
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
    wanted = [
        (name, (*own, *scale, *([] if seed is None else ["--seed", str(seed)]), *more))
        for seed in options.seeds or [None]
        for name, *own in lines
        if not options.only or any(_is_called(name, pattern) for pattern in options.only)
    ]
    # A script takes some 0.05 s to say its flags, and Figure 4 has hundreds of runs.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        told = pool.map(lambda one: Run(*one, trainer_flags(*one)), wanted)
        runs: dict[Path, Run] = {}
        for run in told:
            runs.setdefault(run.folder, run)
    return list(runs.values())


def _is_called(name: str, pattern: str) -> bool:
    """Whether a run's name, or its part behind the folder, is ``pattern``, which may have ``*``."""
    return fnmatch(name, pattern) or fnmatch(name.rpartition("/")[2], pattern)


def config_class(run: Run) -> type:
    """The configuration of the run's trainer."""
    figure, task, *_ = run.name.split("/")
    if figure == "table3":
        trainer = "transformer_xl.distil"
    elif figure == "tablea5" or (figure, task) == ("table2", "sst2"):
        trainer = "transformer_xl.classify"
    elif (figure, task) == ("pretrained", "sst2"):
        trainer = "bert.classify"
    elif figure == "tablea6":
        trainer = "bert.question_answering"
    elif (figure, task) in (("table1", "bert"), ("table1", "roberta")):
        trainer = "bert.pretrain"
    elif figure not in ("table2", "pretrained"):
        trainer = "transformer_xl.train"
    elif task == "csqa":
        trainer = "bert.multiple_choice"
    else:
        trainer = "bert.math_word_problems"
    return config_of(trainer)


def config_of(trainer: str) -> type:
    """The configuration of a trainer, which is called by its module."""
    return getattr(import_module(trainer), CONFIGS[trainer])


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


def from_here(words: Sequence[str], here: Path) -> list[str]:
    """``words`` with the paths in them, which the scripts take from where they are called, from ``here``."""
    flag, found = "", []
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            flag = name[2:].replace("-", "_")
            found.append(f"{name}={here / value}" if equals and flag in PLACES else word)
        else:
            found.append(str(here / word) if flag in PLACES else word)
    return found


def other_source(run: Run) -> str | None:
    """What a finished run was trained on, in words, where its flags say something else than that; else None.

    Its folder names neither the text of a BERT or RoBERTa (--source) nor that of an adapted encoder (--text), and of
    the encoder (--start_from) the name alone; nor where the questions of HotpotQA are from.
    """
    given = dict(given_flags(run.flags))
    if run.name.startswith("pretrained/"):  # a task: its text is that of the run that it starts from
        return other_start(run.starts_from, given.get("start_from", []), given.get("text", []), "text")
    if run.name.startswith("tablea6/"):
        return other_questions(run, given)
    if config_class(run).__name__ == "PretrainConfig":
        return other_start(run.folder, [], given.get("source", []), "source")
    return None


def other_start(trained: Path, encoders: Sequence[str], texts: Sequence[str], flag: str) -> str | None:
    """From which encoder the run in ``trained`` starts, in words, if it is not the last of ``encoders``; or that it was
    trained on other text than ``texts``, which ``flag`` names; else None. None of them: whichever it was.

    Raises ValueError for a text that is not there.
    """
    recorded, result = trained / "config.yaml", trained / "result.json"
    if encoders and recorded.is_file():
        from smoe.yaml_files import load_yaml

        before, now = load_yaml(recorded).get("start_from"), ROOT / encoders[-1]
        if before is not None and (ROOT / before).resolve() != now.resolve():
            return f"starts from the encoder in {before}, not from {now}"
    if texts and result.is_file():
        from data.bookcorpus.corpus import from_files, text_files  # as data/bookcorpus/prepare.py reads them

        files, _ = text_files([ROOT / text for text in texts])
        was = json.loads(result.read_text(encoding="utf-8"))["dataset"].get("origin")
        if was != json.loads(json.dumps(from_files(files, "").origin)):
            return f"is a run on other text than --{flag} names"
    return None


def other_questions(run: Run, given: Mapping[str, Sequence[str]]) -> str | None:
    """That a finished run on HotpotQA, whose questions may be any, is not known to be on those that its flags name.

    Its record has their hash, and the folder of the prepared ones says where these are from.
    """
    source, subquestions = (
        Path(os.path.abspath(ROOT / given[flag][-1])) if given.get(flag) else None
        for flag in ("source", "subquestions")
    )
    if source is None and subquestions is None:
        return None
    from data.hotpotqa.prepare import hotpotqa

    folder = ROOT / dict(given_flags(run.all_flags))["data"][0]
    if not hotpotqa(subquestions).is_prepared(folder, source=source):
        places = {"--source": source, "--subquestions": subquestions}
        asked = shlex.join(str(word) for place in places.items() if place[1] for word in place)
        return f"is compared with {asked} only after python data/hotpotqa/prepare.py {asked}"
    prepared, record = (
        json.loads(file.read_text(encoding="utf-8")) for file in (folder / "meta.json", run.folder / "result.json")
    )
    if prepared["sha256"] != record["dataset"]["sha256"]:
        return "is a run on other questions than --source and --subquestions name"
    return None


def check_flags(trainer: str, *flags: str) -> None:
    """Raises ValueError for flags that the trainer would not take, as far as they don't depend on a run to come."""
    from smoe.train.command import parse_config
    from smoe.train.resume import NoRunError

    with contextlib.suppress(NoRunError):  # the run to start from, which is trained after this
        parse_config(config_of(trainer), flags, prog=f"python -m {trainer}")


def check_start(run: str, encoder: str, text: str) -> None:
    """Raises ValueError if the run starts from another encoder, or was trained on other text."""
    other = other_start(Path(run), [encoder] if encoder else [], [text] if text else [], "text")
    if other is not None:
        raise ValueError(f"{run} {other}; give that, or move the run away")


def main(command: str, *arguments: str) -> int:
    """The command line; returns the exit code."""
    try:
        {"flags": check_flags, "start": check_start}[command](*arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
