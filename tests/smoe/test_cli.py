"""The ``smoe`` command through ``main(argv)``: what it prints, and its exit codes."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from commands import assert_main_refuses

import smoe
from smoe import cli
from smoe.flops import count
from smoe.paper import paper_flops, table1


def run_json(capsys, *argv: str) -> dict:
    assert cli.main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_table1(capsys):
    assert run_json(capsys, "flops", "--table1")["rows"] == table1()
    assert cli.main(["flops", "--table1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 1 + 21
    assert "smoe_dropout_k_half" in lines[7] and "5.6145e10" in lines[7]


def test_arch_by_the_papers_convention(capsys):
    out = run_json(capsys, "flops", "--arch", "bert", "--method", "smoe", "--k", "8", "16", "--batch", "2")
    assert [row["k"] for row in out["rows"]] == [8, 16]
    assert [row["paper"] for row in out["rows"]] == [paper_flops("bert", "smoe", k, batch=2) for k in (8, 16)]
    assert out["seq_len"] == 512 and "true" not in out["rows"][0]
    (dense,) = run_json(capsys, "flops", "--arch", "transformer_xl", "--method", "dense_dropout")["rows"]
    assert dense == {"k": None, "paper": paper_flops("transformer_xl", "dense_dropout")}


@pytest.fixture
def gpt2():
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config).eval()


def test_saved_model(capsys, tmp_path, gpt2):
    gpt2.save_pretrained(tmp_path / "dense")
    (row,) = run_json(capsys, "flops", "--model", str(tmp_path / "dense"), "--seq_len", "8", "--batch", "2")["rows"]
    expected = count(gpt2, {"input_ids": torch.zeros(2, 8, dtype=torch.int64)})
    assert (row["paper"], row["true"]) == (expected.paper_linear, expected.true)
    assert row["params_total"] == expected.params_total


def test_saved_modulized_model(capsys, tmp_path, gpt2):
    model = smoe.modulize(gpt2, num_experts=4, top_k=2)
    smoe.save_pretrained(model, tmp_path / "smoe")
    argv = ("flops", "--model", str(tmp_path / "smoe"), "--seq_len", "8")
    ids = {"input_ids": torch.zeros(1, 8, dtype=torch.int64)}
    for row, k in zip(run_json(capsys, *argv, "--k", "1", "4")["rows"], (1, 4), strict=True):
        assert row["true"] == count(model, ids, k).true
    (row,) = run_json(capsys, *argv)["rows"]
    assert (row["k"], row["true"]) == (2, count(model, ids, 2).true)


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "required"),
        (["count"], "invalid choice: 'count'"),
        (["flops"], "--table1 --arch --model is required"),
        (["flops", "--arch", "gpt"], "invalid choice: 'gpt'"),
        (["flops", "--arch", "bert", "--table1"], "not allowed"),
        (["flops", "--arch", "bert", "--method", "moe"], "method is 'moe'"),
        (["flops", "--arch", "bert", "--k", "17"], "top_k is 17"),
        (["flops", "--arch", "bert", "--k", "x"], "invalid int value: 'x'"),
        (["flops", "--arch", "bert", "--num_experts", "0"], "num_experts is 0"),
        (["flops", "--arch", "bert", "--num_experts", "5"], "num_experts = 5 does not divide"),
        (["flops", "--arch", "bert", "--tgt_len", "5"], "tgt_len is not a size of bert"),
        (["flops", "--arch", "bert", "--method", "dense_dropout", "--k", "2"], "dense_dropout has no experts"),
        (["flops", "--table1", "--k", "2"], "--k has no effect with --table1"),
        (["flops", "--table1", "--k", "0"], "--k has no effect with --table1"),
        (["flops", "--model", "nowhere", "--seq_len", "4"], "no config.json there"),
        (["flops", "--model", "nowhere", "--method", "smoe"], "--method has no effect with --model"),
        (["flops", "--arch", "bert", "--step"], "unrecognized arguments: --step"),
        (["report"], "RUN"),
        (["export", "nowhere", "--to", "hf", "--out", "there"], "'nowhere' holds no config.json"),
        (["export", "nowhere", "--to", "gguf", "--out", "there"], "invalid choice: 'gguf'"),
        (["export", "nowhere", "--to", "hf", "--out", "./nowhere"], "--out is ./nowhere, the model itself"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(argv, message, capsys):
    assert_main_refuses(cli.main, argv, message, capsys)


def test_bad_model_folders(capsys, tmp_path, gpt2):
    gpt2.config.save_pretrained(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "nothing"}')
    for argv, message in (
        (["--model", str(tmp_path)], "--seq_len is missing"),
        (["--model", str(tmp_path), "--seq_len", "33"], "positions for 32"),
        (["--model", str(tmp_path), "--seq_len", "0"], "--seq_len is 0"),
        (["--model", str(broken), "--seq_len", "4"], "config.json describes no model that can be built"),
        (["--model", str(tmp_path), "--seq_len", "4", "--tgt_len", "4"], "--tgt_len has no effect with --model"),
    ):
        assert_main_refuses(cli.main, ["flops", *argv], message, capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["Trainer"]}, "names the architecture Trainer, which transformers lacks"),
        ({"architectures": ["GPT2Config"]}, "names the architecture GPT2Config, which transformers lacks"),
        ({"architectures": ["__class__"]}, "which transformers lacks"),
        ({"architectures": {"a": 1}}, "architectures is {'a': 1}; it must name"),
        ({"architectures": [["GPT2LMHeadModel"]]}, "it must name the class"),
        ({"architectures": ["T5Model"]}, "describes no model that can be built"),
        ({"n_layer": 10**9}, "n_layer is 1000000000; with 10000 tensors it must be at most"),
        ({"n_embd": "wide"}, "describes no model that can be built"),
        ({"auto_map": {"AutoConfig": "trap.Trap"}, "model_type": "trap", "architectures": None}, "describes no model"),
    ],
)
def test_flops_builds_models_of_transformers_alone(change, message, capsys, tmp_path, gpt2):
    gpt2.config.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["architectures"] = ["GPT2LMHeadModel"]
    (tmp_path / "config.json").write_text(json.dumps({**settings, **change}))
    (tmp_path / "trap.py").write_text("open('trapped', 'w')\nclass Trap: ...\n")
    assert_main_refuses(cli.main, ["flops", "--model", str(tmp_path), "--seq_len", "4"], message, capsys)


@pytest.mark.parametrize("content", [b"[" * 10**5, b"\xff", b"[1]", b"1" * 5000])
def test_flops_of_a_damaged_config_is_one_line(content, capsys, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    assert_main_refuses(cli.main, ["flops", "--model", str(tmp_path), "--seq_len", "4"], "config.json", capsys)


def test_export(capsys, tmp_path, gpt2):
    from tiny_models import tiny

    model = smoe.modulize(tiny("Llama"), num_experts=4, top_k=2)
    smoe.save_pretrained(model, tmp_path / "saved")
    metrics = tmp_path / "metrics.json"
    metrics.write_text('{"1": {"BPC": 2.5}}')
    argv = ["export", str(tmp_path / "saved"), "--to", "hf", "--out", str(tmp_path / "out"), "--k", "3"]
    assert cli.main([*argv, "--metrics", str(metrics)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: MixtralForCausalLM\n"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_experts_per_tok"] == 3
    assert "| 2.5000 |" in (tmp_path / "out" / "README.md").read_text()

    metrics.write_text('{"1": 2.5}')
    smoe.save_pretrained(smoe.modulize(gpt2, num_experts=4), tmp_path / "gpt2")
    capsys.readouterr()
    for words, message in (
        ([*argv, "--metrics", str(metrics)], "it must be JSON like"),
        (["export", str(tmp_path / "gpt2"), *argv[2:]], "model is a GPT2LMHeadModel; only Transformers' own Llama"),
    ):
        assert_main_refuses(cli.main, words, message, capsys)


def test_version_and_help(capsys):
    for flag, text in (("--version", f"smoe {smoe.__version__}\n"), ("--help", "usage: smoe")):
        with pytest.raises(SystemExit) as stop:
            cli.main([flag])
        assert stop.value.code == 0 and capsys.readouterr().out.startswith(text)


def test_bench_and_report_get_their_arguments_untouched(monkeypatch, tmp_path):
    (tmp_path / "smoe").mkdir()
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "smoe" / "cli.py"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench"])
    assert stop.value.code == 2

    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "layer.py").write_text("import sys\nsys.exit(len(sys.argv[1:]))\n")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--help", "--json", "x"]) == 3

    seen = []
    monkeypatch.setattr("smoe.report.command.main", lambda argv: seen.append(argv))
    assert cli.main(["report", "--out", "folder", "run"]) == 0
    assert seen == [["--out", "folder", "run"]]


def test_the_library_counts_without_the_models_packages():
    code = """if True:
        import sys
        sys.modules["transformer_xl"] = sys.modules["bert"] = None  # importing them fails
        from smoe.cli import main
        main(["flops", "--table1"]), main(["flops", "--arch", "transformer_xl", "--k", "8"])
    """
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
