"""The command line of a training: flags and YAML -> a configuration -> the loop.

Later wins: the defaults of the configuration's class < its scale's section of the YAML < what is inherited from another
run < ``--config FILE`` < flags.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from smoe.train.config import PROCESS_TIMEOUT
from smoe.train.loop import train
from smoe.train.processes import join
from smoe.train.scale import resolve_scale
from smoe.train.task import Task
from smoe.yaml_files import load_yaml

Config = TypeVar("Config")

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


def run_training(task_class: type[Task], prog: str) -> None:
    """The ``main`` of a task: reads the command line, joins the other processes of the run, and trains."""
    config, error = None, None
    try:
        config = parse_config(task_class.config_class, prog=prog)
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

    Its field ``scale`` picks a section of ``config_class.scales_file``; ``--config FILE`` overlays a user's YAML.
    Raises ValueError, in one line, for anything wrong in ``argv`` or the YAML; ``--help`` prints and exits 0.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.name != "scale_reason"}
    hints = {name: hint for name, hint in get_type_hints(config_class).items() if name in fields}
    notes = field_notes(config_class)
    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="a YAML file of fields; flags win over it")
    for name, field in fields.items():  # those without a default may come from a file: checked below
        note, default = notes[name], field.default
        if default is dataclasses.MISSING:
            note, default = f"required: {note}", None
        parser.add_argument(f"--{name}", type=hints[name], default=default, help=note)

    def checked(values: Mapping[str, Any], source: object) -> dict[str, Any]:
        """What a YAML file says, read by the same types as the flags."""
        values = {name: value for name, value in values.items() if name != "scale_reason"}
        for name, value in values.items():
            _known(name, hints, f"{name} in {source}")
            try:
                if value is None and type(None) not in get_args(hints[name]):
                    raise ArgumentError(None, "null")
                values[name] = parser.parse_object({name: value}, defaults=False)[name]
            except ArgumentError:
                raise ValueError(f"{name} in {source}: {value!r}, expected {describe_type(hints[name])}") from None
        return values

    argv = _normalise(sys.argv[1:] if argv is None else argv, hints)
    for token in argv:
        if token.startswith("--") and token != "--help":
            _known(token[2:].split("=")[0], {"config": str, **hints}, token.split("=")[0])
    try:
        flags = vars(parser.parse_args(argv, defaults=False))
    except ArgumentError as error:
        raise ValueError(_explain(str(error), hints)) from None
    file = flags.pop("config", None)
    given = {**({} if file is None else checked(load_yaml(Path(file)), file)), **flags}
    scales = load_yaml(config_class.scales_file)
    given["scale"], given["scale_reason"] = resolve_scale(given.get("scale", "auto"), scales)
    values = checked(scales[given["scale"]], f"{config_class.scales_file}, {given['scale']}")
    values |= config_class.inherited(given) | given
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise ValueError(f"{name}: missing; give --{name} with {describe_type(hints[name])}")
    return config_class(**values)


def field_notes(config_class: type) -> dict[str, str]:
    """The line of ``--help`` for each field; a subclass that changes a default need not repeat it."""
    bases = (base for base in reversed(config_class.__mro__) if dataclasses.is_dataclass(base))
    return {f.name: f.metadata["help"] for base in bases for f in dataclasses.fields(base) if "help" in f.metadata}


def describe_type(hint: Any) -> str:
    """A type annotation in a user's words, e.g. ``one of a, b`` for a Literal."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list like [x, y] of {describe_type(get_args(hint)[0])}"
    return _WORDS.get(hint) or " or ".join(map(describe_type, get_args(hint))) or hint.__name__


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


def _known(name: str, hints: Mapping[str, Any], shown: str) -> None:
    if name not in hints:
        close = difflib.get_close_matches(str(name), hints, n=1)
        advice = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(hints))}"
        raise ValueError(f"{shown}: no such field; {advice}")


def _explain(message: str, hints: Mapping[str, Any]) -> str:
    """jsonargparse's message of many lines as ``field: value, expected ...``."""
    found = re.search(r'(?:key "|argument --)(\w+)', message)
    if found is None or found[1] not in hints:
        return " ".join(message.split())
    got = re.search(r"(?:Got|Given) value: (.*)", message)
    return f"{found[1]}: {repr(got[1]) if got else 'no value'}, expected {describe_type(hints[found[1]])}"
