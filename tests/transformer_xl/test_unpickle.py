"""Files of torch.save, well-meant or not: their tensors come out, and nothing that they name is run."""

import io
import os
import pickle
import struct
import subprocess
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from transformer_xl import unpickle
from transformer_xl.unpickle import load_tensors

FORMATS = [{}, {"_use_new_zipfile_serialization": False}]


class Whole(nn.Module):
    """A module whose class nobody else has, with every kind of tensor that a state dict may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.parts = nn.ModuleList([nn.LayerNorm(4), nn.Linear(4, 3)])
        self.numbers = nn.ParameterList([nn.Parameter(torch.ones(2).bfloat16())])
        self.turned = nn.Parameter(torch.arange(12.0).reshape(3, 4).t())
        self.flags = nn.Buffer(torch.tensor([True, False]))
        self.register_buffer("ids", torch.arange(5))
        self.register_buffer("unsaved", torch.zeros(2), persistent=False)
        self.register_buffer("nothing", None)
        self.tied = self.first


@pytest.mark.parametrize("options", FORMATS, ids=("zip", "legacy"))
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_state_dicts_and_whole_modules_have_the_tensors_that_torch_loads(options, protocol, tmp_path):
    module = Whole()
    for saved in (module, module.state_dict(), {"state_dict": module.state_dict(), "epoch": 3}, {"model": module}):
        torch.save(saved, tmp_path / "a.pt", pickle_protocol=protocol, **options)
        found = load_tensors(tmp_path / "a.pt")
        assert list(found) == list(module.state_dict())
        for name, value in module.state_dict().items():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def legacy(program: bytes, keys: bytes = pickle.dumps([], 2), numbers: bytes = b"") -> bytes:
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    heads = (unpickle._LEGACY_MAGIC, unpickle._LEGACY_PROTOCOL, system)
    return b"".join(pickle.dumps(head, 2) for head in heads) + program + keys + numbers


def zipped(program: bytes, storages: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("a/data.pkl", program)
        for key, numbers in (storages or {}).items():
            archive.writestr(f"a/data/{key}", numbers)
    return buffer.getvalue()


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


TRAP = "touch trap"
PROGRAMS = {
    "system": pickle.dumps(Calls(os.system, TRAP)),
    "eval": pickle.dumps(Calls(eval, f"__import__('os').system({TRAP!r})")),
    "exec": pickle.dumps(Calls(exec, f"import os; os.system({TRAP!r})")),
    "Popen": pickle.dumps(Calls(subprocess.Popen, ["touch", "trap"])),
    "getattr chain": pickle.dumps(Calls(getattr, Calls(__import__, "os"), "system")),
    "open": pickle.dumps(Calls(open, "trap", "w")),
    "global": b"cposix\nsystem\n(V" + TRAP.encode() + b"\ntR.",
    "stack global": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c" + bytes([len(TRAP)]) + TRAP.encode() + b"\x85R.",
    "stack global of numbers": b"\x80\x04K\x01K\x02\x93.",
    "inst": b"(V" + TRAP.encode() + b"\niposix\nsystem\n.",
    "obj": b"(cposix\nsystem\nV" + TRAP.encode() + b"\no.",
    "newobj": b"\x80\x02cposix\nsystem\nX\x0a\x00\x00\x00" + TRAP.encode() + b"\x85\x81.",
    "extension": b"\x80\x02\x82\x01.",
    "extension of four bytes": b"\x80\x02\x84\x01\x00\x00\x00.",
    "build on a class": b"\x80\x02cos\nenviron\n}X\x01\x00\x00\x00aK\x01sb.",
    "build on a number": b"\x80\x02K\x01}b.",
    "items of a class": b"\x80\x02cos\nenviron\nX\x01\x00\x00\x00aX\x01\x00\x00\x00bs.",
    "append to text": b"\x80\x02X\x01\x00\x00\x00aK\x01a.",
    "text persistent id": b"\x80\x02Pabc\n.",
    "other persistent id": b"\x80\x02X\x01\x00\x00\x00aQ.",
    "memo of nothing": b"\x80\x02h\x07.",
    "far memo": b"\x80\x02K\x01r\xff\xff\xff\xff.",
    "huge text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 50) + b"a.",
    "huge bytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"a.",
    "huge number": b"L" + b"9" * 6000 + b"L\n.",
    "empty": b".",
    "no end": b"\x80\x02K\x01",
    "marks": b"(" * 100_000 + b".",
    "deep lists": b"]" * 100_000 + b"a" * 99_999 + b".",
    "memo bomb": b"\x80\x02]q\x00" + b"".join(b"]q%c(h%ch%ce" % (i, i - 1, i - 1) for i in range(1, 60)) + b".",
    "key of tuples": b"\x80\x02}" + b")" + b"2\x86" * 60 + b"K\x01s.",
    "half a pair": b"\x80\x02}(K\x01u.",
    "dict of a pair of three": b"\x80\x02ccollections\nOrderedDict\n](K\x01K\x02K\x03ee\x85R.",
    "set of lists": b"\x80\x04\x8f(]\x90.",
}


@pytest.mark.parametrize("pack", [legacy, zipped], ids=("legacy", "zip"))
def test_hostile_pickles_are_one_line_and_run_nothing(pack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment = dict(os.environ)
    for name, program in PROGRAMS.items():
        Path("a.pt").write_bytes(pack(program))
        with pytest.raises(ValueError, match=r"^a\.pt: ") as error:
            load_tensors("a.pt")
        assert str(error.value).isprintable() and len(str(error.value)) < 300, name
    assert os.listdir() == ["a.pt"] and dict(os.environ) == environment


def test_what_runs_when_unpickled_is_data_beside_good_tensors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.ones(2)}, "hook": Calls(os.system, TRAP)}, "a.pt")
    assert torch.equal(load_tensors("a.pt")["a"], torch.ones(2))
    module = nn.Linear(2, 2)
    module.hook = Calls(os.system, TRAP)
    torch.save(module, "a.pt")
    assert list(load_tensors("a.pt")) == ["weight", "bias"]
    assert os.listdir() == ["a.pt"]


class Storage:
    def __init__(self, numel, kind="FloatStorage", key="0", numbers=b"\0" * 16):
        self.numel, self.kind, self.key, self.numbers = numel, kind, key, numbers


def tensor_program(storage: Storage, offset=0, size=(4,), stride=(1,)) -> bytes:
    """A state dict {"a": tensor}, as torch.save writes it, with whatever sizes."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return (
                ("storage", getattr(torch, storage.kind), storage.key, "cpu", storage.numel)
                if value is storage
                else None
            )

    buffer = io.BytesIO()
    arguments = (storage, offset, size, stride, False, OrderedDict())
    Pickler(buffer, 2).dump({"a": Calls(torch._utils._rebuild_tensor_v2, *arguments)})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("storage", "view", "message"),
    [
        (Storage(4), {}, None),
        (Storage(2**40), {}, "numbers of storage 0"),
        (Storage(-1), {}, "without key or size"),
        (Storage(True), {}, "without key or size"),
        (Storage(2**70), {}, "without key or size"),
        (Storage(4, kind="QInt8Storage"), {}, "type torch.QInt8Storage, which can't be converted"),
        (Storage(4), {"size": (10**12,), "stride": (0,)}, "more numbers than the 4 of its storage"),
        (Storage(4), {"size": (2,), "stride": (10**9,)}, "more numbers than the 4 of its storage"),
        (Storage(4), {"offset": 1}, "more numbers than the 4 of its storage"),
        (Storage(4), {"offset": -1}, "a shape that can't be"),
        (Storage(4), {"size": (-1,)}, "a shape that can't be"),
        (Storage(4), {"size": (4.0,)}, "a shape that can't be"),
        (Storage(4), {"size": (2, 2)}, "a shape that can't be"),
        (Storage(4), {"size": (1,) * 99, "stride": (1,) * 99}, "a shape that can't be"),
        (Storage(4), {"size": [4]}, "without numbers or shape"),
    ],
)
def test_absurd_sizes(storage, view, message, tmp_path):
    program = tensor_program(storage, **view)
    for content in (
        zipped(program, {"0": storage.numbers}),
        legacy(program, pickle.dumps([storage.key], 2), struct.pack("<q", 4) + storage.numbers),
    ):
        (tmp_path / "a.pt").write_bytes(content)
        if message is None:
            assert torch.equal(load_tensors(tmp_path / "a.pt")["a"], torch.zeros(4))
            continue
        with pytest.raises(ValueError, match=message):
            load_tensors(tmp_path / "a.pt")


def test_archives_that_torch_save_does_not_write(tmp_path):
    program = pickle.dumps({}, 2)
    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("a/data.pkl", program)
        archive.writestr("a/data.pkl", program)
    for content, message in (
        (twice.getvalue(), "other files in it"),
        (zipped(b"0" * 10**6, method=zipfile.ZIP_DEFLATED), "a compressed part"),
        (zipped(program)[:-30], "damaged .zip"),
        (b"", "no file of torch.save, or a damaged one"),
        (b"PK\x03\x04", "damaged .zip"),
        (b"ustar" * 200, "no file of torch.save, or a damaged one"),
    ):
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_tensors(tmp_path / "a.pt")
    with pytest.raises(OSError):
        load_tensors(tmp_path / "none.pt")


def test_modules_within_themselves_end(tmp_path):
    module = nn.Sequential(nn.Linear(1, 1))
    module._modules["again"] = module
    torch.save(module, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="modules within modules without end"):
        load_tensors(tmp_path / "a.pt")
