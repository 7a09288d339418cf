"""Everything that reads files: whatever their bytes are, the outcome is a result or the one clear error.

Each parser starts from a good file, which is damaged (damage.py).
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save

from bert.data import Blocks
from data.bookcorpus.corpus import Store, from_files
from data.bookcorpus.wikitext import articles
from data.csqa.prepare import read_part
from data.dataset import DataSet
from data.errors import SourceError
from data.hotpotqa.prepare import read_composed, read_questions
from data.math_word_problems import read_table
from data.sst2.prepare import read_table as read_sst2
from data.unpack import read_file, read_tar_member, read_zip_member
from smoe.cli import _read_metrics
from smoe.errors import CheckpointError
from smoe.files import hash_json
from smoe.modulize.folder import read_headers, read_json, read_tensors, weight_files
from smoe.modulize.record import read_record
from smoe.report.collect import collect
from smoe.report.costs import read_step_times
from smoe.report.curve import plot_curve
from smoe.report.predictions import read_right
from smoe.report.records import check_result, read_result
from smoe.report.tables import slimming_table
from smoe.train.command import parse_config
from smoe.train.evaluate import _read_config
from smoe.train.examples import _read_part
from smoe.train.folder import RunFolder
from smoe.train.resume import load_checkpoint, read_metrics
from smoe.yaml_files import load_yaml
from tests.fuzz.damage import damaged
from transformer_xl.config import LanguageModelConfig
from transformer_xl.convert import from_release
from transformer_xl.unpickle import load_tensors


@dataclass(frozen=True)
class Parser:
    """`parse(folder, content)` writes the content where the reader looks, and reads it.

    good: contents that are read without an error. errors: what it may raise; a message must be one printable line.
    plain: whether the contents are JSON, whose values are exchanged. few: examples in the suite.
    """

    name: str
    good: Callable[[], list[bytes]]
    parse: Callable[[Path, bytes], Any]
    errors: tuple[type[Exception], ...] = (ValueError,)
    plain: bool = False
    few: int = 60


def contents(parser: Parser) -> st.SearchStrategy[bytes]:
    """Damaged contents of a parser's files."""
    return damaged(parser.good(), parser.plain)


def _json(*values: Any) -> list[bytes]:
    return [json.dumps(value).encode() for value in values]


def _written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# ---- configurations

_CONFIG = {"method": "smoe_dropout", "run_dir": "run", "scale": "smoke", "steps": 10, "num_experts": 4, "d_hidden": 64}
_CONFIG |= {"layers": [0, 1], "sweep": [1, 2, 4], "k_min": 1, "k_max": 4, "schedule": "linear", "output_scale": "k"}
_CONFIG |= {"dropout": 0.1, "seed": 3, "router": None, "precision": "fp32", "d_model": 16, "resume": False}
_YAML = b"base: &b {a: 1, b: [1e-4, x]}\nmore:\n  <<: *b\n  c: 2001-01-01\nlist:\n- 1\n- ~\n- !!set {a, b}\n"


def _yaml(folder: Path, content: bytes) -> None:
    load_yaml(_written(folder, "c.yaml", content))


def _config(folder: Path, content: bytes) -> None:
    file = _written(folder, "c.yaml", content)
    try:
        parse_config(LanguageModelConfig, ["--config", str(file)], prog="x")
    finally:
        _written(folder, "config.yaml", content)
    _read_config(RunFolder(folder), LanguageModelConfig, "a Transformer-XL")


# ---- records and logs

_VALUES = {"valid": {"1": 2.5, "2": 2.25}, "test": {"1": 2.5, "2": 2.25}, "n": {"valid": 8, "test": 8}}
_METRIC = {"title": "bits", "unit": "bpc", "direction": "lower", **_VALUES}
_RECORD = {"model": "transformer_xl", "task": "language_model", "method": "smoe_dropout", "scale": "cpu", "seed": 1}
_RECORD |= {"dataset": {"name": "enwik8"}, "metric": "bpc", "metrics": {"bpc": _METRIC}}
_RECORD |= {"best": {"step": 3, "metric": "bpc", "value": 2.25, "k": 2}, "best_at_other_k": [{"k": 1, "step": 3}]}
_RECORD |= {"parameters": {"total": 9, "active_per_k": {"1": 5, "2": 9}}, "seconds": {"per_step": 0.1}}
_RECORD |= {"config": {"num_layers": 2, "d_hidden": 64, "num_experts": 2, "steps": 3, "k_max": 2, "layers": "all"}}
_RECORD |= {"flops": {"1": {"paper": 3, "true": 4}}, "environment": {"date": "2026"}}
_OLD = {name: _RECORD[name] for name in ("model", "method", "scale", "seed", "dataset", "parameters", "config")}
_OLD |= {"bpc": _VALUES, "best": {"step": 3, "best_step": 2, "best_bpc": 2.25}}
_TIMES = {"model": "bert", "scale": "cpu", "method": "smoe", "k": 1, "seconds_per_step": 1.0, "flops_per_step": 2}
_LOG = [{"step": i, "train": {"bpc": 2.0, "loss": 1.5, "k": [1, 2]}, "valid_k2": {"bpc": 2.5}} for i in range(3)]


def _record(folder: Path, content: bytes) -> None:
    file = _written(folder, "run.json", content)
    _, problems = collect(folder)
    assert all(problem.isprintable() for problem in problems), problems
    slimming_table([check_result(read_result(file), "run")])


def _step_times(folder: Path, content: bytes) -> None:
    _written(folder, "step_times.json", content)
    _, problems = read_step_times(folder)
    assert all(problem.isprintable() for problem in problems), problems


def _log(folder: Path, content: bytes) -> None:
    _written(folder, "result.json", _json(_RECORD)[0])
    read_metrics(_written(folder, "metrics.jsonl", content))
    plot_curve(folder, folder / "curve.svg")


_SAID = {"id": "12", "8": ["+ number0 number1", 0], "16": ["0", 1]}


def _predictions(folder: Path, content: bytes) -> None:
    zipped = content[:2] == b"\x1f\x8b"
    read_right(_written(folder, "a.predictions.jsonl.gz" if zipped else "predictions.jsonl", content))


# ---- models and checkpoints

_LAYER = {"num_experts": 4, "d_hidden": 64, "top_k": 2, "router": "random", "score": "softmax_after_topk"}
_LAYER |= {"output_scale": 1, "dropout": 0.0, "compute": "auto"}
_SETTINGS = {"smoe": {"version": 2, "layers": {"a": _LAYER}, "placed": {}, "widths": {"b": 7}}, "architectures": ["X"]}


def _model_settings(folder: Path, content: bytes) -> None:
    read_record(read_json(_written(folder, "config.json", content)).get("smoe"), "config.json")
    _read_metrics(_written(folder, "metrics.json", content))


def _safetensors() -> list[bytes]:
    return [save({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.arange(3)})]


def _weights(folder: Path, content: bytes) -> None:
    _written(folder, "model.safetensors", content)
    read_headers(weight_files(folder))
    list(read_tensors(weight_files(folder)))


def _sealed(folder: Path, content: bytes) -> None:
    """A checkpoint whose state.json is damaged, and sealed again where it still is JSON."""
    step = folder / "step-00000002"
    try:
        sealed = {"content": (value := json.loads(content)), "sha256": hash_json(value)}
        _written(step, "state.json", json.dumps(sealed).encode())
    except (ValueError, RecursionError):
        _written(step, "state.json", content)
    load_checkpoint(step)


def _pickled() -> list[bytes]:
    layer = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    files = []
    for value, options in (
        (layer, {}),
        (layer, {"_use_new_zipfile_serialization": False}),
        (layer.state_dict(), {"pickle_protocol": 4, "_use_new_zipfile_serialization": False}),
        (_transformer(), {"_use_new_zipfile_serialization": False}),
        (_transformer(), {}),
    ):
        buffer = io.BytesIO()
        torch.save(value, buffer, **options)
        files.append(buffer.getvalue())
    return files


def _transformer() -> OrderedDict[str, torch.Tensor]:
    """The smallest weights that can be converted."""
    shapes = {"word_emb.emb_layers.0.weight": (5, 4), "r_w_bias": (2, 2), "r_r_bias": (2, 2)}
    shapes |= {"crit.out_layers.0.bias": (5,)}
    layer = {"dec_attn.r_net.weight": (4, 4), "dec_attn.o_net.weight": (4, 4), "dec_attn.qkv_net.weight": (12, 4)}
    layer |= {f"{a}.layer_norm.{b}": (4,) for a in ("dec_attn", "pos_ff") for b in ("weight", "bias")}
    layer |= {"pos_ff.gate.gate.weight": (2, 4), "pos_ff.gate.gate.bias": (2,)}
    layer |= {"pos_ff.experts.htoh4.weight": (2, 3, 4), "pos_ff.experts.htoh4.bias": (2, 3)}
    layer |= {"pos_ff.experts.h4toh.weight": (2, 4, 3), "pos_ff.experts.h4toh.bias": (2, 4)}
    shapes |= {f"layers.0.{key}": shape for key, shape in layer.items()}
    return OrderedDict((key, torch.ones(shape)) for key, shape in shapes.items())


def _convert(folder: Path, content: bytes) -> None:
    from_release(load_tensors(_written(folder, "model.pt", content)))


# ---- data sets

_ROWS = "Question,Numbers,Equation,Answer\nhow many number0 and number1,8.0 2.0,- number0 number1,6.0\n"
_CHOICES = [{"label": label, "text": "t"} for label in "ABCDE"]
_QUESTION = {"answerKey": "A", "id": "1", "question": {"stem": "s", "choices": _CHOICES}}
_PARAGRAPHS = {"_id": "1", "question": "q", "answer": "a", "type": "bridge", "context": [["A", ["a b."]]]}
_PARAGRAPHS |= {"supporting_facts": [["A", 0]], "previous_question": "q", "previous_answer": "a"}
_PARAGRAPHS |= {"question_decomposition": [{"question": "q", "answer": "a", "paragraph_support_title": "A"}] * 2}
_PAGE = (
    b"<page><title>A</title><text x='y'>{{a|{{b}}}} '''B''' [[c|d]] &amp;lt; "
    + b"some words here. " * 40
    + b"</text></page>"
)
_IDS = {"pad": 0, "unknown": 1, "start": 2, "end": 3, "mask": 4}
_SPLITS = {split: {"file": f"{split}.bin", "bytes": 16, "sha256": "0" * 64} for split in ("train", "valid", "test")}
_META = {"dataset": "text", "model": "bert", "dtype": "uint16", "sha256": "0", "block_length": 8, "vocab_size": 9}
_META |= {"special_ids": _IDS, "duplicates_left_out": 0, "note": None, "origin": [], "tokenizer": {"sha256": "0"}}
_META |= {"splits": _SPLITS}


def _archives() -> list[bytes]:
    packed, zipped = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name in ("top/other", "top/text"):
            info = tarfile.TarInfo(name)
            info.size = 9
            tar.addfile(info, io.BytesIO(b"some text"))
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("top/text", "some text")
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        with zipfile.ZipFile(zipped, "a", method) as archive:
            archive.writestr(f"top/{method}", "some text")
    plain = gzip.decompress(packed.getvalue())
    return [packed.getvalue(), zipped.getvalue(), gzip.compress(b"text"), lzma.compress(b"text"), plain]


def _archive(folder: Path, content: bytes) -> None:
    first = None
    paths = [_written(folder, "packed", content), _written(folder, "again", gzip.compress(content, 1))]
    for read, path in ((read_file, paths[0]), (read_zip_member, paths[0]), (read_tar_member, paths[1])):
        try:
            size = sum(map(len, read(path, *(["text"] if read is not read_file else []), 100_000)))
            assert size <= 100_000
        except SourceError as error:
            first = first or error
    if first:
        raise first


def _tables(folder: Path, content: bytes) -> None:
    first = None
    for read in (
        lambda: read_sst2(folder, "t.tsv"),
        lambda: read_table(folder / "t.tsv", "t.tsv"),
        lambda: read_part(folder / "t.tsv", "t.tsv"),
    ):
        _written(folder, "t.tsv", content)
        try:
            list(read())
        except SourceError as error:
            first = first or error
    if first:
        raise first


def _paragraphs(folder: Path, content: bytes) -> None:
    file, first = _written(folder, "q.json", content), None
    for read in (read_questions, read_composed):
        try:
            json.dumps(list(read(file, "q.json")))
        except SourceError as error:
            first = first or error
    if first:
        raise first


def _text(folder: Path, content: bytes) -> None:
    Store(folder / "store").fill(articles([content[:50], content[50:]]))
    store = Store(folder / "store")
    store.fill(from_files([_written(folder, "a.txt", content)]).documents())
    assert all(len(piece) <= 30_000 for lines in store.lines(range(len(store.spans))) for piece in lines)


def _prepared(folder: Path, content: bytes) -> None:
    _written(folder, "meta.json", content)
    DataSet("x", folder, {"train": "train.bin"}, "0", (), lambda *_: {}, "").is_prepared(folder, contents=True)
    Blocks(folder, "bert")


def _examples(folder: Path, content: bytes) -> None:
    _read_part(_written(folder, "a.jsonl", content), lambda line: (line["text"], line["label"] + 1), "run: it")


PARSERS = [
    Parser("YAML", lambda: [_YAML, *_json(_CONFIG)], _yaml),
    Parser("configuration", lambda: _json(_CONFIG), _config, plain=True, few=30),
    Parser("run record", lambda: _json(_RECORD, _OLD), _record, plain=True),
    Parser("step times", lambda: _json({"records": [_TIMES]}), _step_times, plain=True),
    Parser("run log", lambda: [b"\n".join(_json(*_LOG)), *_json(_LOG[0])], _log, few=12),
    Parser("predictions", lambda: [*_json(_SAID), gzip.compress(_json(_SAID)[0], mtime=0)], _predictions, few=12),
    Parser("model settings", lambda: _json(_SETTINGS, {"8": {"BPC": 1.5}}), _model_settings, plain=True),
    Parser("safetensors", _safetensors, _weights),
    Parser(
        "checkpoint state",
        lambda: _json({"format": 2, "step": 2, "files": {}, "state": {}}),
        _sealed,
        (CheckpointError,),
        True,
    ),
    Parser("pickled checkpoint", _pickled, _convert),
    Parser("archive", _archives, _archive, (SourceError,)),
    Parser("table", lambda: [_ROWS.encode(), b"sentence\tlabel\na b\t1\n", *_json(_QUESTION)], _tables, (SourceError,)),
    Parser("paragraphs", lambda: _json(_PARAGRAPHS, [_PARAGRAPHS] * 2), _paragraphs, (SourceError,), plain=True),
    Parser("text and wiki markup", lambda: [_PAGE, b"some words\n\nand more\n"], _text),
    Parser("prepared data", lambda: _json(_META), _prepared, plain=True),
    Parser("examples", lambda: _json({"text": "a", "label": 1}), _examples, plain=True),
]


def run(parser: Parser, folder: Path, content: bytes) -> str:
    """``result`` or ``error``. Raises what is neither: another exception, or a message that is no clear line."""
    try:
        parser.parse(folder, content)
    except parser.errors as error:
        module = _raised_in(error)
        if isinstance(error, ValueError) and module not in ("smoe", "bert", "transformer_xl", "data"):
            raise  # another library's: the command line would take it for a bug
        assert "\n" not in str(error).strip(), error  # what else is unprintable, the command line takes out
        return "error"
    return "result"


def _raised_in(error: BaseException) -> str:
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "").split(".")[0]
