"""A trainer's configuration: a flat frozen dataclass, filled from a scale's YAML, a user's YAML and the command line.

Later wins: the class's defaults < `config_dir/{scale}.yaml` < `--config FILE` < flags. Every mistake is a `ValueError`
of one line that names the field, the value and what would be right; `smoe.errors.run_main` makes it an exit code.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

Config = TypeVar("Config")

# A field of this name is filled by `parse_config` with why the scale is what it is; it is no flag.
REASON = "scale_reason"


def parse_config(
    config_class: type[Config], config_dir: str | Path, argv: Sequence[str] | None = None, prog: str | None = None
) -> Config:
    """Build `config_class` (a flat dataclass that checks itself in `__post_init__`) from YAML files and `argv`.

    With a field `scale`, its value picks `config_dir/{scale}.yaml`; `auto` is `paper` with a CUDA device, else `cpu`.
    The instance carries the resolved name, and the reason in `scale_reason` when it has such a field.
    `--config FILE` overlays a YAML of the user's. A lone `--flag` sets a boolean field.

    Raises ValueError for anything wrong in `argv` or the YAML; `--help` prints and exits 0.
    """
    fields = [field for field in dataclasses.fields(config_class) if field.init]
    hints = get_type_hints(config_class)
    parser = _build_parser(config_class, fields, hints, prog)
    flags = _parse_flags(parser, hints, _normalise(sys.argv[1:] if argv is None else argv, hints))
    user_file = flags.pop("config", None)

    given = _checked(load_yaml(Path(user_file)), parser, hints, user_file) if user_file is not None else {}
    given.update(flags)
    values: dict[str, Any] = {}
    if "scale" in hints:
        default = next(field.default for field in fields if field.name == "scale")
        asked = given.get("scale", "auto" if default is dataclasses.MISSING else default)
        scale, reason = resolve_scale(asked, config_dir)
        file = Path(config_dir) / f"{scale}.yaml"
        values = _checked(load_yaml(file), parser, hints, file)
        if values.get("scale", scale) != scale:
            raise ValueError(f"scale in {file}: {values['scale']!r}, expected {scale!r} as in the file's name")
        given["scale"] = scale
        if REASON in hints:
            given[REASON] = reason
    values.update(given)
    for field in fields:
        if (
            field.name not in values
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ):
            raise ValueError(f"{field.name}: missing; give --{field.name} with {describe_type(hints[field.name])}")
    return config_class(**values)


def resolve_scale(scale: str, config_dir: str | Path) -> tuple[str, str]:
    """The scale's own name and why it is that one, e.g. `("cpu", "auto: no CUDA device")`. ValueError if unknown."""
    known = sorted(file.stem for file in Path(config_dir).glob("*.yaml"))
    name, reason = scale, "asked for"
    if scale == "auto":
        import torch

        if torch.cuda.is_available():
            name, reason = "paper", f"auto: CUDA device {torch.cuda.get_device_name()}"
        else:
            name, reason = "cpu", "auto: no CUDA device"
    if name not in known:
        raise ValueError(f"scale: {scale!r}, expected one of {', '.join([*known, 'auto'])}")
    return name, reason


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain data (numbers, text, lists), ready for YAML and JSON."""
    return {name: _plain(value) for name, value in dataclasses.asdict(config).items()}


def to_yaml(config: Mapping[str, Any]) -> str:
    """Plain data as YAML, fields in their own order; floats come back exactly."""
    return yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)


def from_yaml(text: str) -> dict[str, Any]:
    """The inverse of `to_yaml`. Raises yaml.YAMLError; for a file use `load_yaml`."""
    return yaml.load(text, _Loader) or {}


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a flat YAML mapping. ValueError in one line when it is missing, not YAML, not a mapping or repeats a key."""
    try:
        values = from_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config: cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"config: {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"config: {path} holds a {type(values).__name__}, expected lines `field: value`")
    return values


def describe_type(hint: Any) -> str:
    """A type annotation in a user's words, e.g. `one of a, b` for a Literal."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(arg) for arg in args)
    if origin in (tuple, list, Sequence):
        item = describe_type(args[0]) if args else "values"
        return f"a list like [x, y] of {item}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    return words.get(hint, "null" if hint is type(None) else getattr(hint, "__name__", str(hint)))


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice (YAML's reader would silently keep the last one) and reads 1e-4 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} is given twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def field_notes(config_class: type) -> dict[str, str]:
    """What the docstrings of the class and its bases say of each field, as one line."""
    from docstring_parser import parse_from_object

    return {
        param.arg_name: " ".join((param.description or "").split())
        for base in reversed(config_class.__mro__)
        if dataclasses.is_dataclass(base)
        for param in parse_from_object(base).params
    }


def _build_parser(config_class: type, fields: Sequence[dataclasses.Field], hints: Mapping[str, Any], prog: str | None):
    from docstring_parser import parse_from_object
    from jsonargparse import ArgumentParser

    notes = field_notes(config_class)
    parser = ArgumentParser(
        prog=prog,
        usage="%(prog)s [--FIELD VALUE ...]",
        description=parse_from_object(config_class).short_description,
        epilog="Later wins: the defaults above, the YAML of the scale, --config, flags.",
        formatter_class=_help_formatter(),
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", type=str, help="a YAML file of fields; flags win over it")
    for field in fields:
        if field.name == REASON:
            continue
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        default = None if field.default is dataclasses.MISSING else field.default
        shown = "required" if required else f"default: {_shown(default)}"
        parser.add_argument(
            f"--{field.name}",
            type=hints[field.name],
            metavar=_metavar(field.name, hints[field.name]),
            help=f"{notes.get(field.name, '')} ({shown})".strip(),
        )
    return parser


def _help_formatter() -> type:
    """Help as written here: jsonargparse would add Python's names of the types, and a default of null to every flag."""
    from jsonargparse import DefaultHelpFormatter

    class HelpFormatter(DefaultHelpFormatter):
        def _get_help_string(self, action: Any) -> str:
            return action.help or ""

    return HelpFormatter


def _shown(value: Any) -> str:
    """A default as one would write it as a flag's value."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _metavar(name: str, hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "{" + ",".join(map(str, get_args(hint))) + "}"
    if hint is bool:
        return "[{true,false}]"
    return f"{name.upper()} ..." if _is_list(hint) else name.upper()


def _is_list(hint: Any) -> bool:
    return get_origin(hint) in (tuple, list, Sequence)


def _normalise(argv: Sequence[str], hints: Mapping[str, Any]) -> list[str]:
    """Read `--run-dir` as `--run_dir`, a boolean flag with no value after it as true, `--ks 1 2` and `--ks 1,2` as
    `--ks [1,2]` (brackets mean something to a shell)."""
    tokens: list[str] = []
    argv = _joined_lists(argv, hints)
    for position, token in enumerate(argv):
        if re.match(r"--[A-Za-z]", token):
            name, equals, value = token[2:].partition("=")
            token = "--" + name.replace("-", "_") + equals + value
            following = argv[position + 1] if position + 1 < len(argv) else "--"
            if hints.get(token[2:]) is bool and following.startswith("--"):
                token += "=true"
        tokens.append(token)
    return tokens


def _joined_lists(argv: Sequence[str], hints: Mapping[str, Any]) -> list[str]:
    """The values of each flag of a list as one token in brackets."""
    joined: list[str] = []
    waiting = list(argv)
    while waiting:
        token = waiting.pop(0)
        name, equals, value = token[2:].partition("=")
        if not token.startswith("--") or not _is_list(hints.get(name.replace("-", "_"))):
            joined.append(token)
            continue
        values = [value] if equals else []
        while waiting and not waiting[0].startswith("--"):
            values.append(waiting.pop(0))
        written = ",".join(values)
        if values and not written.startswith("["):
            written = f"[{written}]"
        joined += [f"--{name}", written] if values else [token]
    return joined


def _parse_flags(parser: Any, hints: Mapping[str, Any], argv: list[str]) -> dict[str, Any]:
    """The fields given on the command line, and no others."""
    from jsonargparse import ArgumentError

    names = [*(name for name in hints if name != REASON), "config"]
    for token in argv:
        name = token[2:].split("=")[0]
        if token.startswith("--") and name not in names and name != "help":
            raise ValueError(f"--{name}: no such field{_suggest(name, names)}")
    try:
        return {key: value for key, value in vars(parser.parse_args(argv, defaults=False)).items() if key in names}
    except ArgumentError as error:
        raise ValueError(_explain(str(error), hints, "")) from None


def _checked(values: Mapping[str, Any], parser: Any, hints: Mapping[str, Any], source: Any) -> dict[str, Any]:
    """Validate what a YAML file says, field by field, through the same types as the flags."""
    from jsonargparse import ArgumentError

    checked = {}
    for name, value in values.items():
        if name == REASON:
            continue
        if name not in hints:
            raise ValueError(f"{name} in {source}: no such field{_suggest(str(name), list(hints))}")
        if value is None and type(None) not in get_args(hints[name]):
            raise ValueError(f"{name} in {source}: null, expected {describe_type(hints[name])}")
        try:
            checked[name] = parser.parse_object({name: value}, defaults=False)[name]
        except ArgumentError as error:
            raise ValueError(_explain(str(error), hints, f" in {source}", name, value)) from None
    return checked


def _explain(message: str, hints: Mapping[str, Any], where: str, name: str | None = None, value: Any = None) -> str:
    """jsonargparse's many-line message as `field: value, expected ...`."""
    if name is None:
        found = re.search(r'(?:key "|argument --)(\w+)', message)
        if found is None or found[1] not in hints:
            return " ".join(message.split())
        name = found[1]
        got = re.search(r"(?:Got|Given) value: (.*)", message)
        value = got[1] if got else None
    shown = "no value" if value is None else repr(value)
    return f"{name}{where}: {shown}, expected {describe_type(hints[name])}"


def _suggest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(sorted(names))}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
