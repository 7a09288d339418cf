"""Counts of any model and of the paper's sizes, against formulas written out here and the paper's own numbers."""

import pytest
import torch
import transformers
from torch import nn

import smoe
from smoe.flops import count, count_step
from smoe.paper import paper_flops, paper_results, table1

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


def test_one_k_per_layer():
    model, x = nn.Sequential(*(smoe.SMoE(16, 64, 8, 2) for _ in range(3))), torch.randn(5, 16)
    counted = count(model, x, [1, 3, 8])
    assert counted.true == counted.paper_linear == 2 * 5 * (3 * 16 * 8 + (1 + 3 + 8) * 2 * 16 * 8)
    idle = (7 + 5) * (2 * 16 * 8 + 8 + 16)
    assert counted.params_active == counted.params_total - idle
    assert smoe.get_top_k(model) == 2


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


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: paper_flops("gpt", "smoe"), "arch is 'gpt'"),
        (lambda: paper_flops("bert", "moe"), "method is 'moe'"),
        (lambda: paper_flops("bert", "smoe", 17), "top_k is 17"),
        (lambda: paper_flops("bert", "dense_dropout", 2), "dense_dropout has no experts"),
        (lambda: paper_flops("bert", "smoe", batch=0), "batch is 0"),
        (lambda: paper_flops("bert", "smoe", mem_len=1), "mem_len is not a size of bert"),
        (lambda: paper_flops("transformer_xl", "smoe", mem_len=-1), "mem_len is -1.*at least 0"),
        (lambda: count_step(nn.Linear(2, 2), "moe", torch.ones(1, 2)), "method is 'moe'"),
        (lambda: count(nn.Linear(2, 2), torch.ones(1, 2), 1), "no SMoE layer"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
