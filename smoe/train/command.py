"""The command line of a training: flags and YAML -> a configuration -> the loop.

Later wins: the defaults of the configuration's class < its scale's section of the YAML < what is inherited from another
run < ``--config FILE`` < flags.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from smoe.options import field_metadata
from smoe.train.auto import resolve_scale
from smoe.train.config import TrainConfig
from smoe.train.distributed import DistributedProcesses
from smoe.train.loop import train
from smoe.train.mistakes import describe_type, explain, no_such_field
from smoe.train.processes import Processes
from smoe.train.task import Task
from smoe.yaml_files import load_yaml

Config = TypeVar("Config")


def run_training(task_class: type[Task], prog: str) -> None:
    """The ``main`` of a task: reads the command line, joins the other processes of the run, and trains."""
    config, error = None, None
    try:
        config = parse_config(task_class.config_class, prog=prog)
    except ValueError as caught:
        error = caught
    by_torchrun, timeout = {"RANK", "WORLD_SIZE"} <= os.environ.keys(), (config or TrainConfig).process_timeout
    processes = DistributedProcesses(timeout) if by_torchrun else Processes()
    with processes.together():
        if error is not None:
            raise error
    if processes.restarted:
        config = dataclasses.replace(config, resume=True)
        processes.opened()
    train(task_class, config, processes)


def parse_config(config_class: type[Config], argv: Sequence[str] | None = None, prog: str | None = None) -> Config:
    """Builds ``config_class``, a frozen dataclass that checks itself, from YAML files and ``argv``.

    Its field ``scale`` picks a section of ``config_class.scales_file``; ``--config FILE`` overlays a user's YAML.
    Raises ValueError, in one line, for anything wrong in ``argv`` or the YAML; ``--help`` prints and exits 0.
    """
    known, types = field_metadata(config_class), get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.name != "scale_reason"}
    hints = {name: types[name] for name in fields}
    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="a YAML file of fields; flags win over it")
    needed = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    for name, field in fields.items():
        default, note = (None, "required: ") if name in needed else (field.default, "")  # a file may have it
        parser.add_argument(f"--{name}", type=hints[name], default=default, help=note + known[name]["help"])

    def checked(values: Mapping[str, Any], source: object) -> dict[str, Any]:
        """What a YAML file says, read by the same types as the flags."""
        values = {name: value for name, value in values.items() if name != "scale_reason"}
        for name, value in values.items():
            if name not in hints:
                raise no_such_field(name, hints, f"{name} in {source}")
            try:
                if value is None and type(None) not in get_args(hints[name]):
                    raise ArgumentError(None, "null")
                values[name] = parser.parse_object({name: value}, defaults=False)[name]
            except ArgumentError:
                raise ValueError(f"{name} in {source}: {value!r}, expected {describe_type(hints[name])}") from None
        return values

    argv = _normalise(sys.argv[1:] if argv is None else argv, hints)
    for flag in (token.split("=")[0] for token in argv if token.startswith("--")):
        if flag[2:] not in {"help", "config", *hints}:
            raise no_such_field(flag[2:], {"config": str, **hints}, flag)
    try:
        flags = vars(parser.parse_args(argv, defaults=False))
    except ArgumentError as error:
        raise ValueError(explain(str(error), hints)) from None
    file = flags.pop("config", None)
    given = {**({} if file is None else checked(load_yaml(Path(file)), file)), **flags}
    scales = load_yaml(config_class.scales_file)
    given["scale"], given["scale_reason"] = resolve_scale(given.get("scale", "auto"), scales)
    values = checked(scales[given["scale"]], f"{config_class.scales_file}, {given['scale']}")
    values |= config_class.inherited(given) | given
    for name in needed:
        if name not in values:
            raise ValueError(f"{name}: missing; give --{name} with {describe_type(hints[name])}")
    return config_class(**values)


def _normalise(argv: Sequence[str], hints: Mapping[str, Any]) -> list[str]:
    """Rewrites what jsonargparse does not read: ``--run-dir``, a boolean flag without a value, and lists as a shell
    likes them, ``--sweep 1 2`` or ``--sweep 1,2``."""
    tokens: list[str] = []
    for token in argv:
        if token.startswith("--"):
            name, equals, value = token.partition("=")
            tokens.append(name.replace("-", "_").replace("__", "--", 1) + equals + value)
        elif tokens and get_origin(_list_type(hints, tokens[-1])) is tuple:
            tokens[-1] += ("," if "=" in tokens[-1] else "=") + token
        else:
            tokens.append(token)
    for i, token in enumerate(tokens):
        name, equals, value = token.partition("=")
        if hints.get(name[2:]) is bool and not equals and (i + 1 == len(tokens) or tokens[i + 1].startswith("--")):
            tokens[i] = f"{name}=true"
        elif equals and _list_type(hints, token) and value[:1].isdigit():
            tokens[i] = f"{name}=[{value}]"
    return tokens


def _list_type(hints: Mapping[str, Any], token: str) -> Any:
    """The list type that the flag in ``token`` takes, alone or beside words; None if it takes none."""
    hint = hints.get(token[2:].split("=")[0])
    return next((kind for kind in (hint, *get_args(hint)) if get_origin(kind) is tuple), None)
