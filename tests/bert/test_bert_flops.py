"""FLOPs of BERT and RoBERTa against formulas written out here."""

import json

import pytest
import torch
from commands import assert_main_refuses

import smoe
from bert.flops import main, masked_lm
from smoe.flops import count, count_step
from smoe.paper import paper_flops


@pytest.mark.parametrize("model, vocab, width", [("bert", 30522, 6144), ("roberta", 50265, 3072)])
@pytest.mark.parametrize("k", [None, 8, 16])
def test_both_counts_at_the_papers_sizes(model, vocab, width, k):
    tokens, d = 8 * 512, 768
    mlp = 2 * d * width if k is None else 2 * d * (width // 16) * k + d * 16
    expected = 2 * tokens * (12 * (4 * d * d + mlp) + d * d + d * vocab)
    built = masked_lm(model, "dense_dropout" if k is None else "smoe", k)
    counted = count(built, {"input_ids": torch.empty(8, 512, dtype=torch.int64, device="meta")})
    assert counted.paper_linear == expected
    assert counted.true == expected + 2 * 2 * 12 * tokens * 512 * d  # scores and values
    assert counted.params_total == sum(p.numel() for p in built.parameters())


SIZES = {"num_layers": 2, "d_model": 16, "num_heads": 2, "d_hidden": 64, "vocab_size": 50}


def test_dense_and_smoe_layers_side_by_side():
    mixed, dense = masked_lm("bert", "smoe_dropout", num_experts=8, **SIZES), masked_lm("bert", **SIZES)
    mixed.bert.encoder.layer[0] = dense.bert.encoder.layer[0]
    ids = torch.empty(3, 8, dtype=torch.int64, device="meta")
    tokens, attention, head = 24, 4 * 16 * 16, 16 * 16 + 16 * 50
    for k in (1, 5):
        counted = count(mixed, {"input_ids": ids}, k)
        mlps = 2 * 16 * 64 + 8 * 16 + k * 2 * 16 * 8
        assert counted.paper_linear == 2 * tokens * (2 * attention + mlps + head)
        assert counted.true == counted.paper_linear + 2 * 2 * 2 * tokens * 8 * 16
        assert counted.params_total - counted.params_active == (8 - k) * (2 * 16 * 8 + 8 + 16)
        # The backward pass costs twice the forward one, but that nothing learns in front of the fixed router.
        step = count_step(mixed, "smoe_dropout", {"input_ids": ids, "labels": ids}, k)
        assert step == 3 * counted.true - 2 * tokens * 8 * 16
    assert len(smoe.smoe_layers(mixed)) == 1


# ---- the command


def run_json(capsys, *argv: str) -> dict:
    main([*argv, "--json"])
    return json.loads(capsys.readouterr().out)


def test_command_counts_the_papers_model(capsys):
    argv = ("--model", "roberta", "--method", "thor", "--k", "2", "--batch", "1", "--seq_len", "8", "--step")
    (row,) = run_json(capsys, *argv)["rows"]
    assert row["paper"] == paper_flops("roberta", "thor", 2, batch=1, seq_len=8)
    assert row["step"] > 2 * 2 * row["true"]  # THOR runs two passes
    main(argv)
    assert len(capsys.readouterr().out.splitlines()) == 3  # a line on what is counted, a header and one row


def test_command_counts_the_configuration_of_a_run(capsys, tmp_path):
    path = tmp_path / "config.yaml"
    sizes = {name: value for name, value in SIZES.items() if name != "vocab_size"} | {"seq_len": 8}
    fields = {"model": "bert", "method": "thor", "num_experts": 4, "eval_batch_size": 3, "batch_size": 6, **sizes}
    path.write_text(json.dumps(fields))
    argv = ("--config", str(path), "--vocab_size", "50", "--step")
    out = run_json(capsys, *argv)
    assert [row["k"] for row in out["rows"]] == [1, 2, 4]
    for row in out["rows"]:
        assert row["paper"] == paper_flops("bert", "thor", row["k"], num_experts=4, batch=3, **sizes, vocab_size=50)
        assert row["step"] > 4 * 2 * row["true"]  # two passes with their backward passes, on twice as many sequences
    path.write_text(json.dumps(fields | {"consistency_weight": 0}))
    assert [2 * row["step"] for row in run_json(capsys, *argv)["rows"]] == [row["step"] for row in out["rows"]]


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "model: missing; give --model with one of bert, roberta"),
        (["--model", "gpt"], "invalid choice: 'gpt'"),
        (["--model", "bert", "--k", "17"], "top_k is 17"),
        (["--model", "bert", "--method", "dense_dropout", "--k", "2"], "dense_dropout has no experts"),
        (["--model", "bert", "--vocab_size", "0"], "vocab_size is 0; it must be a whole number of at least 1"),
        (["--model", "bert", "--seq_len", "0"], "seq_len is 0; it must be a whole number of at least 1"),
        (["--model", "bert", "--config", "nowhere.yaml"], "cannot read nowhere.yaml"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(argv, message, capsys):
    assert_main_refuses(main, argv, message, capsys)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="model is 'transformer_xl'; it must be one of bert, roberta"):
        masked_lm("transformer_xl")
