"""Counts against formulas written out here, against PyTorch's counter on a pass that really runs, and the paper."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import smoe
from smoe.flops import (
    count,
    count_step,
    masked_lm,
    paper_flops,
    table1,
    transformer_xl_flops,
    transformer_xl_step_flops,
)
from smoe.methods import METHODS, get_method
from smoe.paper import paper_results
from transformer_xl.model import TransformerXL, TransformerXLConfig

SMALL = TransformerXLConfig(vocab_size=40, num_layers=2, d_model=16, num_heads=2, d_head=8, d_hidden=64)
BATCH, TGT, MEM = 2, 6, 10


def small_model(method: str, **options) -> TransformerXL:
    if get_method(method).routed:
        options = {"num_experts": 8, "compute": "reference", **options}
    return TransformerXL(SMALL, lambda i: get_method(method).make_mlp(SMALL.d_model, SMALL.d_hidden, **options))


def really_run(model: nn.Module, method: str, k: int | None, backward: bool) -> int:
    """PyTorch's count of a pass on real tensors with the model's own forward."""
    if k is not None:
        smoe.set_top_k(model, k)
    ids = torch.randint(SMALL.vocab_size, (BATCH, TGT))
    memory = torch.randn(SMALL.num_layers, BATCH, MEM, SMALL.d_model)
    with FlopCounterMode(display=False) as counter:
        if backward:
            get_method(method).loss(model, lambda: model(ids, ids, memory)).total.backward()
        else:
            with torch.no_grad():
                model(ids, ids, memory)
    return counter.get_total_flops()


# ---- Table 1


def test_every_cell_of_table_1():
    cells = table1()
    assert len(cells) == 21
    for cell in cells:
        tolerance = 1e-4 if cell["arch"] == "transformer_xl" else 1.5e-3
        assert cell["paper"] == paper_results()["table1"][cell["arch"]][cell["row"]]["flops"] * 1e10
        assert abs(cell["flops"] / cell["paper"] - 1) < tolerance, cell


@pytest.mark.parametrize("k", [None, 1, 8, 16])
def test_paper_count_of_transformer_xl(k):
    # 4 layers of width 256, 8 heads of 64, MLP 8192 = 16 x 512, 10 sequences of 128 tokens after 896 remembered.
    attention = 10 * 1024 * 256 * 3 * 512 + 1024 * 256 * 512 + 1280 * 512 * 256
    mlp = 1280 * 2 * 256 * 8192 if k is None else 1280 * (2 * 256 * 512 * k + 256 * 16)
    expected = 2 * 4 * (attention + mlp)
    assert paper_flops("transformer_xl", "dense_dropout" if k is None else "smoe_dropout", k) == expected


@pytest.mark.parametrize("arch, vocab, width", [("bert", 30522, 6144), ("roberta", 50265, 3072)])
@pytest.mark.parametrize("k", [None, 8, 16])
def test_paper_count_of_bert(arch, vocab, width, k):
    tokens, d = 8 * 512, 768
    mlp = 2 * d * width if k is None else 2 * d * (width // 16) * k + d * 16
    expected = 2 * tokens * (12 * (4 * d * d + mlp) + d * d + d * vocab)
    method = "dense_dropout" if k is None else "smoe"
    assert paper_flops(arch, method, k) == expected
    pytest.importorskip("transformers")
    model = masked_lm(arch, method, k)
    counted = count(model, {"input_ids": torch.empty(8, 512, dtype=torch.int64, device="meta")})
    assert counted.paper_linear == expected
    assert counted.true == expected + 2 * 2 * 12 * tokens * 512 * d  # scores and values
    assert counted.params_total == sum(p.numel() for p in model.parameters())


# ---- Transformer-XL


@pytest.mark.parametrize("method", METHODS)
def test_true_count_is_what_a_real_pass_does(method):
    model = small_model(method)
    for k in (1, 3, 8) if METHODS[method].routed else (None,):
        counted = transformer_xl_flops(model, k, batch=BATCH, tgt_len=TGT, mem_len=MEM)
        assert counted["true"] == really_run(model, method, k, backward=False)
        step = transformer_xl_step_flops(model, method, k, batch=BATCH, tgt_len=TGT, mem_len=MEM)
        assert step == really_run(model, method, k, backward=True)
        assert step > 2 * counted["true"]


def test_count_does_not_depend_on_how_experts_are_computed():
    counts = {
        transformer_xl_flops(small_model("smoe_dropout", compute=compute), 5)["true"]
        for compute in ("auto", *smoe.compute.PATHS)
    }
    assert len(counts) == 1


def test_the_paper_count_of_a_model_is_that_of_its_sizes():
    sizes = {"num_layers": 2, "d_model": 16, "num_heads": 2, "d_head": 8, "d_hidden": 64}
    for method, k in (("dense_dropblock", None), ("thor", 2), ("smoe_dropout", 8)):
        expected = paper_flops("transformer_xl", method, k, num_experts=8, **sizes)
        assert transformer_xl_flops(small_model(method), k)["paper"] == expected


def test_parameters_and_bytes():
    model = small_model("smoe_dropout")
    per_expert = 2 * 16 * 8 + 8 + 16
    total = sum(p.numel() for p in model.parameters())
    for k in (1, 4, 8):
        counted = transformer_xl_flops(model, k)
        assert counted["params_total"] == total
        assert counted["params_active"] == total - 2 * (8 - k) * per_expert
        assert counted["weight_bytes"] == 4 * (total + 2 * (8 * 16 + 8))  # the fixed routers are saved as well
    dense = transformer_xl_flops(small_model("dense_dropout"))
    assert dense["params_active"] == dense["params_total"] == total - 2 * 7 * 16  # experts share no output bias


@pytest.mark.parametrize("scale", ["paper", "cpu", "smoke"])
@pytest.mark.parametrize("method", METHODS)
def test_every_yaml_costs_what_its_sizes_say(scale, method):
    pytest.importorskip("jsonargparse")
    from smoe.run.config import parse_config
    from transformer_xl.config import CONFIG_DIR, TrainConfig

    c = parse_config(TrainConfig, CONFIG_DIR, ["--method", method, "--run_dir", ".", "--scale", scale])
    with torch.device("meta"):
        model = c.build_model()
    shape = {"batch": c.eval_batch_size, "tgt_len": c.eval_tgt_len, "mem_len": c.eval_mem_len}
    d, inner, n, routed = c.d_model, c.num_heads * c.d_head, c.num_experts, METHODS[method].routed
    tokens, context = c.eval_batch_size * c.eval_tgt_len, c.eval_tgt_len + c.eval_mem_len
    for k in {c.sweep_ks()[0], c.sweep_ks()[-1]}:
        counted = transformer_xl_flops(model, k, **shape)
        attention = 3 * c.eval_batch_size * context * d * inner + context * d * inner + tokens * inner * d
        mlp = n * d + 2 * d * c.d_hidden // n * k if routed else 2 * d * c.d_hidden
        assert counted["paper"] == 2 * c.num_layers * (attention + tokens * mlp)
        mlp = 2 * d * c.d_hidden + c.d_hidden + d * (n if routed else 1)
        mlp += {"dense_concrete_dropout": 1, "smoe": n * d + n}.get(method, 0)
        outside = 256 * d + 256 + 2 * inner  # tied embedding, output bias, u and v
        assert counted["params_total"] == c.num_layers * (5 * d * inner + 4 * d + mlp) + outside


# ---- any model


class Block(nn.Module):
    """A user's transformer layer: PyTorch's attention, and an SMoE layer."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = smoe.SMoE(16, 64, 8, 4, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x + self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("gated, matrices", [(False, 2), (True, 3)])
@pytest.mark.parametrize("meta", [True, False])
def test_a_users_model(gated, matrices, meta):
    model, x = Block(gated=gated), torch.randn(3, 5, 16)
    for k in (1, 8):
        counted = count(model, x, k, meta=meta)
        linear = 2 * 15 * (4 * 16 * 16 + 8 * 16 + k * matrices * 16 * 8)
        assert counted.paper_linear == linear
        assert counted.true == linear + 2 * 2 * 3 * 5 * 5 * 16
    assert count(model, x, meta=meta) == count(model, (x,), 4, meta=meta)


def test_routers_without_arithmetic_and_token_ids():
    x, ids = torch.randn(5, 16), torch.arange(5)
    layer = smoe.SMoE(16, 64, 8, 2, router="hash", vocab_size=10)
    assert count(layer, {"x": x, "token_ids": ids}).true == 2 * 5 * 2 * 2 * 16 * 8
    assert count(smoe.SMoE(16, 64, 8, 2, router="uniform"), x).true == 2 * 5 * 2 * 2 * 16 * 8


def test_counting_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model, x = Block().train(), torch.randn(2, 3, 16)
    before, random = {n: (t, t.clone()) for n, t in model.state_dict(keep_vars=True).items()}, torch.get_rng_state()
    y = model(x)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    count(model, x, 2)
    with pytest.raises(ValueError, match="top_k is 9"):
        count(model, x, 9)
    with pytest.raises(RuntimeError, match="shape"):
        count(model.mlp, torch.ones(2, 7), 2)
    assert torch.equal(random, torch.get_rng_state())
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    assert all(after[n] is t and torch.equal(t, values) for n, (t, values) in before.items())
    assert model.mlp.top_k == 4 and torch.equal(model(x), y)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(module._forward_hooks for module in model.modules())


def test_nothing_is_allocated():
    with torch.device("meta"):
        layer = smoe.SMoE(2**14, 2**20, 16)  # 128 GiB of weights
    counted = count(layer, torch.empty(2**20, 2**14, device="meta"), 3)
    assert counted.true == 2 * 2**20 * (16 * 2**14 + 3 * 2 * 2**14 * 2**16)
    assert counted.weight_bytes > 2**37


def test_a_forward_that_looks_at_values():
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) if x.sum().item() > 0 else x

    with pytest.raises(ValueError, match="Looks can't be counted from shapes alone.*meta=False"):
        count(Looks(), torch.ones(2, 4))
    assert count(Looks(), torch.ones(2, 4), meta=False).true == 2 * 2 * 4 * 4


def test_compiled_and_bf16_models_count_the_same():
    model, x = Block(), torch.randn(2, 3, 16)
    expected = count(model, x)
    half = count(model.to(torch.bfloat16), x.bfloat16())
    assert (half.true, half.paper_linear) == (expected.true, expected.paper_linear)
    router = 8 * 16 + 8  # stays in float32
    assert half.weight_bytes - 4 * router == (expected.weight_bytes - 4 * router) / 2
    model = torch.compile(model, backend="eager")
    assert count(model, x.bfloat16()) == half


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_modulized_hugging_face_model(name):
    transformers = pytest.importorskip("transformers")
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)
        model, matrices, attention = transformers.GPT2LMHeadModel(config), 2, 4 * 16 * 16
    else:
        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        )
        model, matrices, attention = transformers.LlamaForCausalLM(config), 3, 4 * 16 * 16
    ids = torch.zeros(2, 8, dtype=torch.int64)
    dense = count(model.eval(), {"input_ids": ids})
    assert dense.paper_linear == 2 * 16 * (2 * (attention + matrices * 16 * 64) + 16 * 50)
    smoe.modulize(model, num_experts=8)
    for k in (1, 4, 8):
        counted = count(model, {"input_ids": ids}, k)
        saved = 2 * 16 * 2 * (matrices * 16 * 8 * (8 - k) - 8 * 16)
        assert counted.paper_linear == dense.paper_linear - saved
        assert counted.true == dense.true - saved


def test_frozen_experts_need_less_of_a_backward_pass():
    model = small_model("smoe_dropout")
    whole = transformer_xl_step_flops(model, "smoe_dropout", 4, batch=BATCH, tgt_len=TGT, mem_len=MEM)
    for _, layer in smoe.smoe_layers(model):
        layer.experts.requires_grad_(False)
    frozen = transformer_xl_step_flops(model, "smoe_dropout", 4, batch=BATCH, tgt_len=TGT, mem_len=MEM)
    assert whole - frozen == 2 * SMALL.num_layers * BATCH * TGT * 4 * 2 * 16 * 8


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: paper_flops("gpt", "smoe"), "arch is 'gpt'"),
        (lambda: paper_flops("bert", "moe"), "method is 'moe'"),
        (lambda: paper_flops("bert", "smoe", 17), "top_k is 17"),
        (lambda: paper_flops("bert", "dense_dropout", 2), "dense_dropout has no experts"),
        (lambda: paper_flops("bert", "smoe", batch=0), "batch is 0"),
        (lambda: paper_flops("bert", "smoe", mem_len=1), "mem_len is no size of bert"),
        (lambda: masked_lm("transformer_xl"), "bert or roberta"),
        (lambda: transformer_xl_flops(small_model("smoe"), tgt_len=0), "tgt_len is 0"),
        (lambda: count_step(nn.Linear(2, 2), "moe", torch.ones(1, 2)), "method is 'moe'"),
        (lambda: count(nn.Linear(2, 2), torch.ones(1, 2), 1), "no SMoE layer"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
