"""A Transformer-XL's FLOPs against formulas written out here and PyTorch's counter on a pass that really runs."""

import json

import pytest
import torch
from commands import assert_main_refuses
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import smoe
from smoe.flops import count_step
from smoe.methods import METHODS, Method, get_method
from smoe.paper import SIZES, paper_flops
from smoe.train.command import parse_config
from smoe.train.config import to_dict
from smoe.yaml_files import to_yaml
from transformer_xl.config import LanguageModelConfig
from transformer_xl.cost import evaluation_flops, meta_inputs
from transformer_xl.flops import main
from transformer_xl.model import TransformerXL, TransformerXLConfig

SMALL = TransformerXLConfig(vocab_size=40, num_layers=2, d_model=16, num_heads=2, d_head=8, d_hidden=64)
BATCH, TGT, MEM = 2, 6, 10
SHAPE = {"batch": BATCH, "tgt_len": TGT, "mem_len": MEM}


def small_model(method: str, dense_layers: tuple[int, ...] = (), **options) -> TransformerXL:
    """Its MLPs are those of `method`, in `dense_layers` plain dense ones."""
    if get_method(method).routed:
        options = {"num_experts": 8, "compute": "reference", **options}

    def make_mlp(layer: int) -> nn.Module:
        if layer in dense_layers:
            return get_method("dense_dropout").make_mlp(SMALL.d_model, SMALL.d_hidden)
        return get_method(method).make_mlp(SMALL.d_model, SMALL.d_hidden, **options)

    return TransformerXL(SMALL, make_mlp)


def step_flops(
    model: nn.Module, method: str, k: int | list[int] | None, batch: int, tgt_len: int, mem_len: int, **weights
):
    return count_step(model, method, meta_inputs(model, batch, tgt_len, mem_len), k, **weights)


def really_run(model: nn.Module, method: str, k: int | list[int] | None, backward: bool, **weights: float) -> int:
    """PyTorch's count of a pass on real tensors with the model's own forward."""
    if k is not None:
        smoe.set_top_k(model, k)
    ids = torch.randint(SMALL.vocab_size, (BATCH, TGT))
    memory = torch.randn(SMALL.num_layers, BATCH, MEM, SMALL.d_model)
    with FlopCounterMode(display=False) as counter:
        if backward:
            get_method(method).loss(model, lambda: model(ids, ids, memory), **weights).total.backward()
        else:
            with torch.no_grad():
                model(ids, ids, memory)
    return counter.get_total_flops()


@pytest.mark.parametrize("method", METHODS)
def test_true_count_is_what_a_real_pass_does(method):
    model = small_model(method)
    for k in (1, 3, 8) if METHODS[method].routed else (None,):
        counted = evaluation_flops(model, k, **SHAPE)
        assert counted["true"] == really_run(model, method, k, backward=False)
        step = step_flops(model, method, k, **SHAPE)
        assert step == really_run(model, method, k, backward=True)
        assert step > 2 * counted["true"]


def test_count_does_not_depend_on_how_experts_are_computed():
    counts = {
        evaluation_flops(small_model("smoe_dropout", compute=compute), 5, **SHAPE)["true"]
        for compute in ("auto", *smoe.compute.PATHS)
    }
    assert len(counts) == 1


def test_the_paper_count_of_a_model_is_that_of_its_sizes():
    sizes = {"num_layers": 2, "d_model": 16, "num_heads": 2, "d_head": 8, "d_hidden": 64, **SHAPE}
    for method, k in (("dense_dropblock", None), ("thor", 2), ("smoe_dropout", 8)):
        expected = paper_flops("transformer_xl", method, k, num_experts=8, **sizes)
        assert evaluation_flops(small_model(method), k, **SHAPE)["paper"] == expected


def test_parameters_and_bytes():
    model = small_model("smoe_dropout")
    per_expert = 2 * 16 * 8 + 8 + 16
    total = sum(p.numel() for p in model.parameters())
    for k in (1, 4, 8):
        counted = evaluation_flops(model, k, **SHAPE)
        assert counted["params_total"] == total
        assert counted["params_active"] == total - 2 * (8 - k) * per_expert
        assert counted["weight_bytes"] == 4 * (total + 2 * (8 * 16 + 8))  # the fixed routers are saved as well
    dense = evaluation_flops(small_model("dense_dropout"), None, **SHAPE)
    assert dense["params_active"] == dense["params_total"] == total - 2 * 7 * 16  # experts share no output bias


@pytest.mark.parametrize("scale", ["paper", "cpu", "smoke"])
@pytest.mark.parametrize("method", METHODS)
def test_every_yaml_costs_what_its_sizes_say(scale, method):
    c = parse_config(LanguageModelConfig, ["--method", method, "--run_dir", ".", "--scale", scale])
    with torch.device("meta"):
        model = c.build_model()
    shape = {"batch": c.eval_batch_size, "tgt_len": c.eval_tgt_len, "mem_len": c.eval_mem_len}
    d, inner, n, routed = c.d_model, c.num_heads * c.d_head, c.num_experts, METHODS[method].routed
    tokens, context = c.eval_batch_size * c.eval_tgt_len, c.eval_tgt_len + c.eval_mem_len
    for k in {c.sweep_ks()[0], c.sweep_ks()[-1]}:
        counted = evaluation_flops(model, k, **shape)
        attention = 3 * c.eval_batch_size * context * d * inner + context * d * inner + tokens * inner * d
        mlp = n * d + 2 * d * c.d_hidden // n * k if routed else 2 * d * c.d_hidden
        assert counted["paper"] == 2 * c.num_layers * (attention + tokens * mlp)
        mlp = 2 * d * c.d_hidden + c.d_hidden + d * (n if routed else 1)
        mlp += {"dense_concrete_dropout": 1, "smoe": n * d + n}.get(method, 0)
        outside = 256 * d + 256 + 2 * inner  # tied embedding, output bias, u and v
        assert counted["params_total"] == c.num_layers * (5 * d * inner + 4 * d + mlp) + outside


def test_frozen_experts_need_less_of_a_backward_pass():
    model = small_model("smoe_dropout")
    whole = step_flops(model, "smoe_dropout", 4, **SHAPE)
    for _, layer in smoe.smoe_layers(model):
        layer.experts.requires_grad_(False)
    frozen = step_flops(model, "smoe_dropout", 4, **SHAPE)
    assert whole - frozen == 2 * SMALL.num_layers * BATCH * TGT * 4 * 2 * 16 * 8


# ---- only some layers are SMoE


@pytest.mark.parametrize("k", [1, 4, 8])
def test_dense_and_smoe_layers_side_by_side(k):
    model = small_model("smoe_dropout", dense_layers=(0,))
    counted = evaluation_flops(model, k, **SHAPE)
    tokens, context, d = BATCH * TGT, TGT + MEM, 16
    # Queries, keys and values of memory and tokens, positions, the output: what Table 1 counts per layer.
    attention = 3 * BATCH * context * d * d + context * d * d + tokens * d * d
    mlps = tokens * (2 * d * 64) + tokens * (8 * d + k * 2 * d * 8)
    assert counted["paper"] == 2 * (2 * attention + mlps)
    # The whole arithmetic: queries of the tokens alone, one more position, scores twice and values once, the head.
    attention = tokens * d * d + 2 * BATCH * context * d * d + (context + 1) * d * d + tokens * d * d
    attention += tokens * d * (context + 1 + context + context)
    assert (
        counted["true"] == 2 * (2 * attention + mlps + tokens * d * 40) == really_run(model, "smoe_dropout", k, False)
    )
    per_expert = 2 * d * 8 + 8 + d
    assert counted["params_active"] == sum(p.numel() for p in model.parameters()) - (8 - k) * per_expert
    step = step_flops(model, "smoe_dropout", k, **SHAPE)
    assert step == really_run(model, "smoe_dropout", k, backward=True)


def test_one_k_per_layer():
    model = small_model("smoe_dropout")
    one, eight, both = (evaluation_flops(model, k, **SHAPE) for k in (1, 8, [1, 8]))
    for name in ("paper", "true", "params_active"):
        assert both[name] == (one[name] + eight[name]) / 2 and one[name] < eight[name]
    step = step_flops(model, "smoe_dropout", [1, 8], **SHAPE)
    assert step == really_run(model, "smoe_dropout", [1, 8], backward=True)
    assert smoe.get_top_k(model) == [1, 8]  # as the real run set it
    with pytest.raises(ValueError, match=r"k is \[1, 2, 3\], 3 numbers"):
        evaluation_flops(model, [1, 2, 3], **SHAPE)
    assert smoe.get_top_k(model) == [1, 8]


# ---- the weights of the auxiliary losses


def test_without_consistency_loss_there_is_one_pass():
    model = small_model("thor")
    one = step_flops(model, "thor", 2, **SHAPE, consistency_weight=0.0)
    assert one == really_run(model, "thor", 2, backward=True, consistency_weight=0.0)
    assert step_flops(model, "thor", 2, **SHAPE) == 2 * one
    assert step_flops(model, "smoe", 2, **SHAPE) == one
    assert step_flops(model, "smoe", 2, **SHAPE, consistency_weight=1.0) == 2 * one


def test_the_weights_reach_the_methods_loss(monkeypatch):
    given, loss = [], Method.loss
    monkeypatch.setattr(Method, "loss", lambda *args, **weights: given.append(weights) or loss(*args, **weights))
    step_flops(small_model("smoe"), "smoe", 2, **SHAPE, consistency_weight=0.5, balance_weight=0.25)
    step_flops(small_model("smoe"), "smoe", 2, **SHAPE)
    both = ("consistency_weight", "balance_weight")
    assert given == [dict(zip(both, (0.5, 0.25), strict=True)), dict.fromkeys(both)]


def test_lengths_of_one_and_no_memory():
    assert evaluation_flops(small_model("smoe"), 2, batch=1, tgt_len=1, mem_len=0)["paper"] > 0


# ---- the command


def run_json(capsys, *argv: str) -> dict:
    main([*argv, "--json"])
    return json.loads(capsys.readouterr().out)


def test_command_counts_the_papers_model(capsys):
    short = ("--batch", "2", "--tgt_len", "4", "--mem_len", "8")
    half, whole = run_json(capsys, "--k", "8", "16", "--step", *short)["rows"]
    assert half["paper"] == paper_flops("transformer_xl", "smoe_dropout", 8, batch=2, tgt_len=4, mem_len=8)
    assert half["params_total"] == whole["params_total"] == whole["params_active"]
    assert whole["params_active"] - half["params_active"] == 4 * 8 * (2 * 256 * 512 + 512 + 256)
    assert whole["true"] - half["true"] == 2 * 8 * 4 * 8 * 2 * 256 * 512
    assert whole["step"] - half["step"] == 3 * (whole["true"] - half["true"])
    out = run_json(capsys, "--step", "--method", "dense_dropout")
    assert out["rows"][0]["paper"] == paper_flops("transformer_xl", "dense_dropout") and out["rows"][0]["k"] is None
    shape = {name: SIZES["transformer_xl"][name] for name in SHAPE}
    assert {name: out[name] for name in SHAPE} == shape
    assert [out[f"step_{name}"] for name in SHAPE] == [22, 512, 512]


def test_command_counts_the_configuration_of_a_run(capsys, tmp_path):
    argv = ["--method", "thor", "--scale", "smoke", "--run_dir", "runs/x", "--num_experts", "4"]
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(to_dict(parse_config(LanguageModelConfig, argv))))
    out = run_json(capsys, "--config", str(path), "--step")
    assert (out["method"], [row["k"] for row in out["rows"]]) == ("thor", [1, 2, 4])
    assert out["rows"][2]["step"] > out["rows"][0]["step"]
    path.write_text(to_yaml(to_dict(parse_config(LanguageModelConfig, [*argv, "--consistency_weight", "0"]))))
    one_pass = run_json(capsys, "--config", str(path), "--step")
    assert [2 * row["step"] for row in one_pass["rows"]] == [row["step"] for row in out["rows"]]
    out = run_json(capsys, "--config", str(path), "--method", "smoe_dropout", "--num_experts", "2")
    assert (out["method"], [row["k"] for row in out["rows"]]) == ("smoe_dropout", [1, 2])
    scale = run_json(capsys, "--scale", "smoke", "--k", "2")
    assert (scale["method"], len(scale["rows"])) == ("smoe_dropout", 1)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--config", "nowhere.yaml"], "cannot read nowhere.yaml"),
        (["--method", "moe"], "method: 'moe', expected one of dense_dropout"),
        (["--k", "17"], "top_k is 17"),
        (["--method", "dense_dropout", "--k", "2"], "dense_dropout has no experts"),
        (["--num_experts", "5"], "num_experts = 5 does not divide"),
        (["--batch", "0"], "batch is 0; it must be a whole number of at least 1"),
        (["--tgt_len", "0"], "tgt_len is 0; it must be a whole number of at least 1"),
        (["--mem_len", "-1"], "mem_len is -1; it must be a whole number of at least 0"),
        (["--batch", "1.0"], "argument --batch: invalid int value: '1.0'"),
        (["--seq_len", "5"], "unrecognized arguments: --seq_len 5"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(argv, message, capsys):
    assert_main_refuses(main, argv, message, capsys)
