"""What is an MLP, what only looks like one, and what is said about it."""

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny_models import tiny
from torch import nn

import smoe
from smoe.modulize.find import find_mlps, survey_mlps

pytestmark = pytest.mark.usefixtures("registry")
D, H = 16, 64


def mlp(h=H, act=nn.GELU):
    return nn.Sequential(nn.Linear(D, h), act(), nn.Linear(h, D))


def assert_same_as_experts(model, x=None):
    """Cut into experts it computes what it did, and something else at a smaller k."""
    x = torch.randn(2, 5, D) if x is None else x
    y = model.eval()(x)
    smoe.modulize(model, 4, score="sum")
    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-5)
    smoe.set_top_k(model, 1)
    assert not torch.allclose(model(x), y, atol=1e-4)


class Gated(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, h), nn.Linear(D, h), nn.Linear(h, D)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Fused(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.both, self.down = nn.Linear(D, 2 * h), nn.Linear(h, D)

    def forward(self, x):
        value, gate = self.both(x).chunk(2, -1)
        return self.down(F.gelu(gate) * value)


@pytest.mark.parametrize("make", [mlp, Gated, Fused])
@pytest.mark.parametrize("h", [D, H])
def test_hidden_layers_as_wide_as_the_model_are_cut_too(make, h):
    model = nn.Sequential(make(h), mlp(H))
    assert len(find_mlps(model)) == 2
    assert_same_as_experts(model)


def test_square_layers_of_attention_are_no_mlps():
    for model in (nn.TransformerEncoderLayer(D, 2, H, batch_first=True), tiny("BERT"), tiny("Llama")):
        assert all(found.d_hidden == H for found in find_mlps(model))


# Activations that the model writes out.


class Written(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.a, self.b = nn.Linear(D, H), nn.Linear(H, D)
        self._function = (function,)  # no attribute that could be tried

    def forward(self, x):
        return self.b(self._function[0](self.a(x)))


WRITTEN = {
    "relu2": lambda x: F.relu(x).square(),
    "quick GELU": lambda x: x * torch.sigmoid(1.702 * x),
    "tanh GELU": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "swish": lambda x: x / (1 + torch.exp(-x)),
    "selu": F.selu,
    "softsign": lambda x: x / (1 + x.abs()),
    "leaky": lambda x: torch.maximum(x, 0.01 * x),
    "sin": torch.sin,
    "hardtanh": lambda x: x.clamp(-1, 1),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_activations_that_are_written_out(name):
    assert_same_as_experts(nn.Sequential(Written(WRITTEN[name])))


def test_an_unknown_elementwise_activation_is_named_as_what_register_mlp_takes():
    function = lambda x: torch.exp(-(x**2))  # noqa: E731
    model = nn.Sequential(Written(function))
    call = r"smoe.register_mlp\(Written, up='a', down='b', activation=...\) takes the function"
    with pytest.raises(
        ValueError, match=r"0 \(Written\): its activation is elementwise, but none that smoe knows; " + call
    ):
        smoe.modulize(model, 4)
    smoe.register_mlp(Written, up="a", down="b", activation=function)
    assert_same_as_experts(model)


class OddGate(Gated):
    def forward(self, x):
        return self.down(F.relu(self.gate(x)) ** 3 * self.up(x))


def test_an_unknown_activation_with_a_gate_is_named():
    with pytest.raises(ValueError, match=r"register_mlp\(OddGate, up='gate', gate='up', down='down', activation"):
        smoe.modulize(nn.Sequential(OddGate(H)), 4)


@pytest.mark.parametrize("function", [lambda x: x.softmax(-1), lambda x: F.layer_norm(x, (H,)), lambda x: x.cumsum(-1)])
def test_what_is_not_elementwise_is_not_called_so(function):
    with pytest.raises(ValueError, match="is no activation of what left its first") as error:
        smoe.modulize(nn.Sequential(Written(function)), 4)
    assert "elementwise" not in str(error.value)


# Attention and its linear pairs.


class LowRank(nn.Module):
    def __init__(self, rank=4):
        super().__init__()
        self.a, self.b = nn.Linear(D, rank, bias=False), nn.Linear(rank, D, bias=False)

    def forward(self, x):
        return self.b(self.a(x))


class Attention(nn.Module):
    """Low-rank queries, and an activation that lies about."""

    def __init__(self, wide=D):
        super().__init__()
        self.q_a, self.q_b, self.v = nn.Linear(D, 4), nn.Linear(4, D), LowRank()
        self.k, self.o, self.act = nn.Linear(D, D), nn.Linear(D, D), nn.SiLU()

    def forward(self, x, positions):
        return self.o(F.scaled_dot_product_attention(self.q_b(self.q_a(x)) + positions[0], self.k(x), self.v(x)))


class WideAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, D)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.o(self.act(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))))


class HighRank(LowRank):
    def __init__(self):
        super().__init__(H)


@pytest.mark.parametrize("attention", [Attention, WideAttention, LowRank, HighRank])
def test_attention_beside_an_mlp_is_left_alone(attention):
    model = nn.ModuleDict({"attention": attention(), "mlp": mlp()})
    smoe.modulize(model, 4)
    assert [name for name, _ in smoe.smoe_layers(model)] == ["mlp.2.mlp"]


def test_a_mixer_alone_has_no_mlp():
    with pytest.raises(ValueError, match=r"has no MLP that smoe knows; looked at: 0 \(WideAttention\)"):
        smoe.modulize(nn.Sequential(WideAttention()), 4)


def test_a_hybrid_of_mixers_and_mlps():
    settings = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings |= {"num_key_value_heads": 2, "intermediate_size": 64, "num_experts": 1, "attn_layer_period": 2}
    settings |= {"attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 4}
    model = transformers.JambaForCausalLM(transformers.JambaConfig(**settings))
    smoe.modulize(model, 4)
    assert all(".feed_forward." in name for name, _ in smoe.smoe_layers(model)) and len(smoe.smoe_layers(model)) == 2


# Adapters and other layers in the place of linear ones.


class Adapted(nn.Module):
    """The shape of PEFT's LoRA layer."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base_layer, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


@pytest.mark.parametrize("rank", [2, D, H])
def test_adapters_that_no_mlp_touches_stay(rank):
    model = tiny("BERT")
    for layer in model.bert.encoder.layer:
        attention = layer.attention.self
        attention.query, attention.value = Adapted(attention.query, rank), Adapted(attention.value, rank)
    smoe.modulize(model, 4)
    assert len(smoe.smoe_layers(model)) == 2 and isinstance(attention.query, Adapted)


@pytest.mark.parametrize("which", [[0], [2], [0, 2]])
def test_adapters_on_an_mlp_are_named(which):
    model = nn.ModuleDict({"good": mlp(), "adapted": mlp()})
    for i in which:
        model["adapted"][i] = Adapted(model["adapted"][i])
    with pytest.raises(ValueError, match=rf"adapted.{which[0]} is a test_find.Adapted, which is no plain linear layer"):
        smoe.modulize(model, 4)


def test_parametrised_layers_are_named():
    model = nn.ModuleDict({"good": mlp(), "normed": mlp()})
    nn.utils.parametrizations.weight_norm(model["normed"][0])
    with pytest.raises(ValueError, match="normed.0 is a .*ParametrizedLinear, which is no plain linear layer"):
        smoe.modulize(model, 4)


def test_the_real_peft():
    model = peft.get_peft_model(tiny("BERT"), peft.LoraConfig(target_modules=["query", "value"], r=2))
    assert len(smoe.smoe_layers(smoe.modulize(model, 4))) == 2
    model = peft.get_peft_model(tiny("BERT"), peft.LoraConfig(target_modules=["intermediate.dense"], r=2))
    with pytest.raises(ValueError, match="intermediate.dense is a peft.tuners.lora.layer.Linear"):
        smoe.modulize(model, 4)
    assert len(smoe.smoe_layers(smoe.modulize(model.merge_and_unload(), 4))) == 2


# Models that have experts already.


class Mixture(nn.Module):
    def __init__(self, router=True):
        super().__init__()
        self.experts = nn.ModuleList(mlp() for _ in range(4))
        self.gate = nn.Linear(D, 4 if router else 3)

    def forward(self, x):
        weights = self.gate(x).softmax(-1)
        return sum(weights[..., i % weights.shape[-1], None] * expert(x) for i, expert in enumerate(self.experts))


def test_a_list_of_experts_beside_a_router_is_named():
    model = nn.ModuleDict({"dense": mlp(), "mixture": Mixture()})
    with pytest.raises(ValueError, match=r"mixture \(Mixture\): it holds 4 experts already; .*skip=True"):
        smoe.modulize(model, 4)
    assert not smoe.smoe_layers(model)
    smoe.register_mlp(Mixture, skip=True)
    assert [name for name, _ in smoe.smoe_layers(smoe.modulize(model, 4))] == ["dense.2.mlp"]


def test_a_list_of_mlps_without_a_router_is_a_stack():
    assert len(find_mlps(Mixture(router=False))) == 4


def test_the_authors_word_counts():
    smoe.register_mlp(nn.Sequential, up="0", down="2", activation="gelu")
    assert len(find_mlps(Mixture())) == 4


MOE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Qwen2Moe", {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 32, "num_experts": 4}),
        ("Mixtral", {"num_local_experts": 4, "intermediate_size": 32}),
        ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 8}),
        ("GptOss", {"num_local_experts": 4, "intermediate_size": 32, "head_dim": 8}),
    ],
)
def test_stacked_experts_are_named_and_nothing_is_cut(name, settings):
    config = getattr(transformers, f"{name}Config")(**MOE, **settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with pytest.raises(
        ValueError, match=rf"layers.0.mlp.experts \({name}Experts\): it holds 4 experts already"
    ) as error:
        smoe.modulize(model, 4)
    assert "layers.1.mlp.experts" in str(error.value) and not smoe.smoe_layers(model)
    if name == "Qwen2Moe":  # its shared experts may be cut by those who want it
        smoe.register_mlp(type(model.model.layers[0].mlp.experts), skip=True)
        assert len(smoe.smoe_layers(smoe.modulize(model, 4))) == 2


def test_switch_transformers_experts_are_named():
    settings = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_sparse_encoder_layers": 1, "num_heads": 2}
    settings |= {"num_decoder_layers": 2, "num_sparse_decoder_layers": 1, "num_experts": 4, "vocab_size": 40}
    config = transformers.SwitchTransformersConfig(**settings)
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"mlp.experts \(SwitchTransformersExperts\): it holds 4 experts already"):
        smoe.modulize(model, 4)


def test_weights_per_head_are_no_experts():
    assert len(find_mlps(tiny("XLNet"))) == 2


def test_a_model_that_builds_smoe_layers_itself_is_told_so():
    model = nn.Sequential(mlp(), smoe.SMoE(D, H, 4))
    with pytest.raises(ValueError, match=r"has SMoE layers already; its own code builds them \(1\)"):
        smoe.modulize(model, 4)
    with pytest.raises(ValueError, match="has no SMoE layer that smoe.modulize made; adopt_layers"):
        smoe.demodulize(model)


def test_narrow_mlps_are_found_on_demand_alone():
    model = nn.Sequential(mlp(4), mlp(H))
    assert [found.name for found in find_mlps(model)] == ["1.2"]
    assert [found.name for found in survey_mlps(model, narrow=True).narrow] == ["0.2"]
