"""The instructions of a pickle, followed as far as they build data: nothing is imported, called or set on an object.

A pickle is a program that may call any function. Here its instructions are only listed (`pickletools.genops`), and
those that build data are followed: plain containers, tensors of the known number types, and for every other class or
function a stand-in that keeps the arguments and the state as data.
"""

import math
import pickletools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import IO, Any

import torch
from torch import Tensor

MAX_PICKLE_BYTES, MAX_INSTRUCTIONS = 64 << 20, 1_000_000

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_PUSHED = {  # instructions whose argument is the value
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}


@dataclass(frozen=True)
class Name:
    """A class or function that the pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, repr=False)
class StandIn:
    """What the pickle would make by calling `kind`: never made, its arguments and state kept as data."""

    kind: Any
    arguments: Any = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)


SET = Name("builtins", "set")


@dataclass(eq=False, repr=False)
class Storage:
    """Numbers that tensors are views of. `data` comes after the pickle that names it."""

    dtype: torch.dtype
    key: str
    numel: int
    data: Tensor | None = None


@dataclass(frozen=True, repr=False)
class View:
    """A tensor to be."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        assert self.storage.data is not None
        return self.storage.data.as_strided(self.size, self.stride, self.offset)


class Damaged(Exception):
    """The file is not what torch.save writes; the message says why."""


def follow(file: IO[bytes]) -> tuple[Any, dict[str, Storage]]:
    """What one pickle describes, and the storages that it names by key."""
    machine = _Machine()
    try:
        for number, (instruction, argument, _) in enumerate(pickletools.genops(_Bounded(file))):
            if number >= MAX_INSTRUCTIONS:
                raise Damaged(f"has a pickle of more than {MAX_INSTRUCTIONS} instructions")
            if instruction.name == "STOP":
                break
            machine.step(instruction.name, argument)
        return machine.pop(), machine.storages
    except (IndexError, KeyError, ValueError, TypeError, OverflowError) as error:
        raise Damaged(f"is no file of torch.save, or a damaged one ({shown(error)})") from None


class _Bounded:
    """A file of which one value has at most `MAX_PICKLE_BYTES`: Python makes room for as much as a length claims."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.tell = file, file.tell

    def read(self, size: int) -> bytes:
        if size > MAX_PICKLE_BYTES:
            raise ValueError(f"a value of {size} bytes")
        return self.file.read(size)

    def readline(self) -> bytes:
        return self.file.readline(MAX_PICKLE_BYTES)


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks under the marks
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def pop(self) -> Any:
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def step(self, name: str, argument: Any) -> None:
        """Follow one instruction. Raises Damaged for one that plain data and tensors don't need."""
        push = self.stack.append
        if name in _PUSHED:
            push(argument)
        elif name in _CONSTANTS:
            push(_CONSTANTS[name]())
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            push(self.memo[argument])
        elif name == "MARK":
            self.below.append(self.stack)
            self.stack = []
        elif name in ("POP_MARK", "TUPLE", "LIST", "DICT"):
            items = self.pop_to_mark()
            if name != "POP_MARK":
                self.stack.append(tuple(items) if name == "TUPLE" else items if name == "LIST" else _pairs(items))
        elif name == "EMPTY_SET":
            push(StandIn(SET))
        elif name == "FROZENSET":
            items = self.pop_to_mark()
            self.stack.append(StandIn(SET, items=items))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            items = [self.pop() for _ in range(int(name[-1]))]
            push(tuple(reversed(items)))
        elif name == "POP":
            self.pop()
        elif name == "DUP":
            push(self.stack[-1])
        elif name == "APPEND":
            self.add([self.pop()])
        elif name in ("APPENDS", "ADDITEMS"):
            self.add(self.pop_to_mark())
        elif name == "SETITEM":
            value, key = self.pop(), self.pop()
            self.set_items([key, value])
        elif name == "SETITEMS":
            self.set_items(self.pop_to_mark())
        elif name == "GLOBAL":
            push(Name(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            last, first = self.pop(), self.pop()
            if not isinstance(first, str) or not isinstance(last, str):
                raise Damaged("names a class by something that is no text")
            push(Name(first, last))
        elif name == "REDUCE":
            arguments, kind = self.pop(), self.pop()
            push(_call(kind, arguments))
        elif name in ("NEWOBJ", "NEWOBJ_EX"):
            if name == "NEWOBJ_EX":
                self.pop()
            arguments, kind = self.pop(), self.pop()
            push(_call(kind, arguments))
        elif name == "BUILD":
            self.build(self.pop())
        elif name == "BINPERSID":
            push(self.persistent(self.pop()))
        elif name not in ("PROTO", "FRAME"):
            raise Damaged(f"has the pickle instruction {name}, which neither tensors nor modules need")

    def add(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, (list, StandIn)):
            raise Damaged(f"adds to a {type(target).__name__}")
        (target.items if isinstance(target, StandIn) else target).extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, StandIn):
            target.items += items
        elif isinstance(target, dict):
            target |= _pairs(items)
        else:
            raise Damaged(f"sets items of a {type(target).__name__}")

    def build(self, state: Any) -> None:
        target = self.stack[-1]
        if isinstance(target, StandIn):
            target.state = state
        elif not isinstance(target, (dict, View)):  # an OrderedDict's or a tensor's own attributes: not needed
            raise Damaged(f"sets the state of a {type(target).__name__}")

    def persistent(self, what: Any) -> Any:
        if not isinstance(what, tuple) or not what:
            raise Damaged("refers to something outside itself")
        if what[0] == "module" and len(what) == 4:  # the class, its source file and source, of whole modules
            return what[1]
        if what[0] != "storage" or len(what) not in (5, 6) or not isinstance(what[1], Name):
            raise Damaged("refers to something outside itself that is no storage")
        kind, key, numel = what[1], what[2], what[4]
        if kind.module not in ("torch", "torch.cuda") or kind.name not in _DTYPES:
            raise Damaged(f"has numbers of the type {shown(kind)}, which can't be converted")
        if not isinstance(key, str) or not is_size(numel) or len(what) == 6 and what[5] is not None:
            raise Damaged("has a storage without key or size")
        storage = self.storages.setdefault(key, Storage(_DTYPES[kind.name], key, numel))
        if (storage.dtype, storage.numel) != (_DTYPES[kind.name], numel):
            raise Damaged(f"has two storages {shown(key)}")
        return storage


def _call(kind: Any, arguments: Any) -> Any:
    """What calling `kind` is taken to give: a container, a tensor to be, or a stand-in."""
    if not isinstance(arguments, tuple):
        raise Damaged("calls something with arguments that are no tuple")
    name = str(kind) if isinstance(kind, Name) else ""
    if name == "collections.OrderedDict":
        pairs = arguments[0] if arguments else []
        if not isinstance(pairs, list) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
            raise Damaged("has an OrderedDict of something else than pairs")
        return _pairs([item for pair in pairs for item in pair])
    if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor") and len(arguments) >= 4:
        return _view(*arguments[:4])
    if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state") and arguments:
        return arguments[0]
    if name == "torch._tensor._rebuild_from_type_v2" and len(arguments) == 4 and arguments[0] != kind:
        return _call(arguments[0], arguments[2])  # of a subclass, such as nn.Buffer
    if name == "torch.Size" and arguments:
        return arguments[0]
    return StandIn(kind, arguments)


def _view(storage: Any, offset: Any, size: Any, stride: Any) -> View:
    if not isinstance(storage, Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise Damaged("has a tensor without numbers or shape")
    if not all(map(is_size, (offset, *size, *stride))) or len(size) != len(stride) or len(size) > 8:
        raise Damaged("has a tensor of a shape that can't be")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # No more elements than numbers: expanded ones would take memory without end once they are copied.
    if math.prod(size) > storage.numel or math.prod(size) and last >= storage.numel:
        raise Damaged(f"has a tensor of more numbers than the {storage.numel} of its storage")
    if not math.prod(size):
        return View(storage, 0, size, (1,) * len(size))
    return View(storage, offset, size, stride)


def _pairs(items: list[Any]) -> dict[Hashable, Any]:
    if len(items) % 2:
        raise Damaged("has a key without a value")
    # Of tuples within tuples the hash alone may take for ever.
    if not all(isinstance(key, (str, int, float, bytes, type(None), Name)) for key in items[::2]):
        raise Damaged("has a key that is neither text nor a number")
    return dict(zip(items[::2], items[1::2], strict=True))


def is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48


def shown(what: Any) -> str:
    text = what if isinstance(what, (str, Name, Exception)) else type(what).__name__
    return "".join(c if c.isprintable() else "?" for c in str(text)[:100])
