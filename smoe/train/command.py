"""The command line of a training: flags and YAML -> a configuration -> the loop.

Later wins: the defaults of the configuration's class < the section of the scale in its YAML < what is inherited from
another run < ``--config FILE`` < flags.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from docstring_parser import parse_from_object
from jsonargparse import ArgumentError, ArgumentParser

from smoe.train.config import PROCESS_TIMEOUT, TrainConfig
from smoe.train.loop import train
from smoe.train.processes import join
from smoe.train.scale import resolve_scale
from smoe.train.task import Task
from smoe.train.yaml_files import load_yaml

Config = TypeVar("Config")

_REASON = "scale_reason"  # filled here, no flag
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}


def run_training(task_class: type[Task], config_class: type[TrainConfig], prog: str) -> None:
    """The ``main`` of a task: reads the command line, joins the other processes of the run, and trains."""
    config, error = None, None
    try:
        config = parse_config(config_class, prog=prog)
    except ValueError as caught:
        error = caught
    processes = join(PROCESS_TIMEOUT if config is None else config.process_timeout)
    with processes.together():
        if error is not None:
            raise error
    if processes.restarted:
        config = dataclasses.replace(config, resume=True)
        processes.opened()
    train(task_class, config, processes)


def parse_config(config_class: type[Config], argv: Sequence[str] | None = None, prog: str | None = None) -> Config:
    """Builds ``config_class``, a frozen dataclass that checks itself, from YAML files and ``argv``.

    With a field ``scale``, its value picks a section of ``config_class.scales_file``; ``auto`` is ``paper`` with a CUDA
    device, else ``cpu``. ``--config FILE`` overlays a YAML of the user's.

    Raises ValueError, in one line, for anything wrong in ``argv`` or the YAML; ``--help`` prints and exits 0.
    """
    hints = get_type_hints(config_class)
    hints = {field.name: hints[field.name] for field in dataclasses.fields(config_class)}
    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False, epilog=__doc__.strip().split("\n\n")[1])
    parser.add_argument("--config", metavar="FILE", help="a YAML file of fields; flags win over it")
    notes = field_notes(config_class)
    for field in dataclasses.fields(config_class):
        if field.name != _REASON:  # required ones may come from a file: checked below
            required, default = ("required: ", None) if field.default is dataclasses.MISSING else ("", field.default)
            help = required + notes.get(field.name, "")
            parser.add_argument(f"--{field.name}", type=hints[field.name], default=default, help=help)
    argv = _normalise(sys.argv[1:] if argv is None else argv, hints)
    flags = _parse_flags(parser, hints, argv)
    file = flags.pop("config", None)
    user = {} if file is None else _checked(load_yaml(Path(file)), parser, hints, file)
    given = {**user, **flags}
    values: dict[str, Any] = {}
    if "scale" in hints:
        scales = load_yaml(config_class.scales_file)
        given["scale"], given[_REASON] = resolve_scale(given.get("scale", "auto"), list(scales))
        source = f"{config_class.scales_file}, {given['scale']}"
        values = _checked(scales[given["scale"]], parser, hints, source)
        values |= config_class.inherited(given)
    values |= given
    for field in dataclasses.fields(config_class):
        if field.name not in values and field.default is dataclasses.MISSING:
            raise ValueError(f"{field.name}: missing; give --{field.name} with {describe_type(hints[field.name])}")
    return config_class(**values)


def field_notes(config_class: type) -> dict[str, str]:
    """What the docstrings of the class and its bases say of each field, as one line."""
    params = [param for base in config_class.__mro__[-2::-1] for param in parse_from_object(base).params]
    return {param.arg_name: " ".join((param.description or "").split()) for param in params}


def _normalise(argv: Sequence[str], hints: Mapping[str, Any]) -> list[str]:
    """Rewrites what jsonargparse does not read by itself: ``--run-dir`` as ``--run_dir``, a boolean flag without a value
    as true, ``--sweep 1 2`` and ``--sweep 1,2`` as ``--sweep=[1,2]`` (brackets mean something to a shell)."""
    tokens: list[str] = []
    waiting = list(argv)
    while waiting:
        name, equals, value = waiting.pop(0).partition("=")
        if not re.match(r"--[A-Za-z]", name):
            tokens.append(name + equals + value)
            continue
        name = "--" + name[2:].replace("-", "_")
        values = [value] if equals else []
        while not equals and waiting and not re.match(r"--[A-Za-z]", waiting[0]):
            values.append(waiting.pop(0))
        hint = hints.get(name[2:])
        if hint is bool and not values:
            values = ["true"]
        elif _takes_list(hint) and values:
            joined = ",".join(values)
            values = [f"[{joined}]" if hint in _lists(hint) or joined[0].isdigit() else joined]
        tokens += [f"{name}={values[0]}", *values[1:]] if values else [name]
    return tokens


def _lists(hint: Any) -> list[Any]:
    """The list types among the types of a field."""
    return [kind for kind in (hint, *get_args(hint)) if get_origin(kind) in (tuple, list)]


def _takes_list(hint: Any) -> bool:
    return bool(_lists(hint))


def _parse_flags(parser: ArgumentParser, hints: Mapping[str, Any], argv: list[str]) -> dict[str, Any]:
    """The fields given on the command line, and no others."""
    names = [*(name for name in hints if name != _REASON), "config"]
    for token in argv:
        name = token[2:].split("=")[0]
        if token.startswith("--") and name not in names and name != "help":
            raise ValueError(f"--{name}: no such field{_suggest(name, names)}")
    try:
        return {key: value for key, value in vars(parser.parse_args(argv, defaults=False)).items() if key in names}
    except ArgumentError as error:
        raise ValueError(_explain(str(error), hints)) from None


def _checked(
    values: Mapping[str, Any], parser: ArgumentParser, hints: Mapping[str, Any], source: Any
) -> dict[str, Any]:
    """What a YAML file says, read by the same types as the flags."""
    checked = {}
    for name, value in values.items():
        if name == _REASON:
            continue
        if name not in hints:
            raise ValueError(f"{name} in {source}: no such field{_suggest(str(name), list(hints))}")
        if value is None and type(None) not in get_args(hints[name]):
            raise ValueError(f"{name} in {source}: null, expected {describe_type(hints[name])}")
        try:
            checked[name] = parser.parse_object({name: value}, defaults=False)[name]
        except ArgumentError:
            raise ValueError(f"{name} in {source}: {value!r}, expected {describe_type(hints[name])}") from None
    return checked


def _explain(message: str, hints: Mapping[str, Any]) -> str:
    """jsonargparse's message of many lines as ``field: value, expected ...``."""
    found = re.search(r'(?:key "|argument --)(\w+)', message)
    if found is None or found[1] not in hints:
        return " ".join(message.split())
    got = re.search(r"(?:Got|Given) value: (.*)", message)
    return f"{found[1]}: {repr(got[1]) if got else 'no value'}, expected {describe_type(hints[found[1]])}"


def describe_type(hint: Any) -> str:
    """A type annotation in a user's words, e.g. ``one of a, b`` for a Literal."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if _takes_list(hint) and hint in _lists(hint):
        return f"a list like [x, y] of {describe_type(get_args(hint)[0])}"
    if get_args(hint):
        return " or ".join(describe_type(arg) for arg in get_args(hint))
    return _WORDS.get(hint, "null" if hint is type(None) else getattr(hint, "__name__", str(hint)))


def _suggest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(sorted(names))}"
