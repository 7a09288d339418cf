"""A bad option of a benchmark gives one line, before anything is measured."""

import sys

import pytest
import torch

from benchmarks import layer, step


@pytest.mark.parametrize(
    ("program", "option", "words"),
    [
        (layer, ["--k", "4", "17"], "--k is 17; it must be from 1 to 16"),
        (layer, ["--repeats", "0"], "--repeats is 0; it must be at least 1"),
        (layer, ["--device", "cuda"], "--device is cuda, but PyTorch finds no CUDA device here"),
        (step, ["--threads", "-1"], "--threads is -1; it must be at least 1"),
        (step, ["--batch", "0"], "--batch is 0; it must be at least 1"),
    ],
)
def test_bad_option(program, option, words, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmark", *option])
    with pytest.raises(SystemExit) as end:
        program.main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and words in error and error.count("\n") == 1
