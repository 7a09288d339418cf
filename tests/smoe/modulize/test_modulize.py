"""``modulize`` on plain PyTorch models: forms, dropout, choice of layers, what it refuses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import smoe
from smoe.modulize import find

D, H = 16, 64
pytestmark = pytest.mark.filterwarnings("ignore:the dense model will compute something else")


def sequential(dropout=0.0):
    return nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Dropout(dropout), nn.Linear(H, D))


class TimmMlp(nn.Module):
    """The shape of timm's Mlp: dropouts on both sides, a norm that is nothing."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(D, H), nn.GELU(), nn.Dropout(dropout)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(H, D), nn.Dropout(dropout)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class ConvNeXtBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(D, D, 7, padding=3, groups=D), nn.LayerNorm(D)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D)

    def forward(self, x):
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        return x + self.pwconv2(self.act(self.pwconv1(y))).permute(0, 3, 1, 2)


class GluFeedForward(nn.Module):
    """One wide layer and a list: the shape of diffusers' FeedForward."""

    class Glu(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(D, 2 * H)

        def forward(self, x):
            value, gate = self.proj(x).chunk(2, dim=-1)
            return value * F.gelu(gate)

    def __init__(self):
        super().__init__()
        self.net = nn.ModuleList([self.Glu(), nn.Dropout(0.1), nn.Linear(H, D)])

    def forward(self, x):
        for module in self.net:
            x = module(x)
        return x


class FlatBlock(nn.Module):
    """Attention and MLP side by side in one module, the activation written into forward; needs a position argument."""

    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleDict({name: nn.Linear(D, D) for name in "qkvo"})
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D, bias=False)

    def forward(self, x, scale):
        q, k, v = (self.attention[name](x) for name in "qkv")
        x = x + self.attention["o"](F.scaled_dot_product_attention(q * scale.sum(), k, v))
        return x + self.down(F.silu(self.up(x)))


class FlatModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(FlatBlock() for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x, torch.ones(1))
        return x


FORMS = {
    "Sequential": (sequential, (2, 3, D)),
    "Sequential of Sequentials": (lambda: nn.Sequential(sequential(), nn.LayerNorm(D), sequential()), (5, D)),
    "timm Mlp": (TimmMlp, (2, 3, D)),
    "ConvNeXt block": (ConvNeXtBlock, (2, D, 8, 8)),
    "activation in place": (lambda: nn.Sequential(nn.Linear(D, H), nn.SiLU(inplace=True), nn.Linear(H, D)), (3, D)),
    "GLU in a list": (GluFeedForward, (2, 3, D)),
    "flat blocks": (FlatModel, (2, 3, D)),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(D, 2, H, batch_first=True), (2, 3, D)),
    "TransformerEncoderLayer, GELU": (
        lambda: nn.TransformerEncoderLayer(D, 2, H, activation="gelu", norm_first=True, batch_first=True),
        (2, 3, D),
    ),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, H, batch_first=True), 2),
        (2, 3, D),
    ),
}


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", FORMS)
def test_same_output_and_exact_way_back(name, grad):
    make, shape = FORMS[name]
    torch.manual_seed(0)
    model, x = randomised(make()), torch.randn(shape)
    before = copy.deepcopy(model.state_dict())
    classes = [(name, type(module)) for name, module in model.named_modules()]
    with torch.set_grad_enabled(grad):
        y = model(x)
        smoe.modulize(model, 4, score="sum")
        torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-5)
        smoe.set_top_k(model, 2)
        assert not torch.allclose(model(x), y, atol=1e-3)
        smoe.demodulize(model)
        assert torch.equal(model(x), y)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)
    assert [(name, type(module)) for name, module in model.named_modules()] == classes


def test_decoder_layer():
    model = randomised(nn.TransformerDecoderLayer(D, 2, H, batch_first=True))
    x, memory = torch.randn(2, 3, D), torch.randn(2, 5, D)
    y = model(x, memory)
    torch.testing.assert_close(smoe.modulize(model, 4, score="sum")(x, memory), y, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_encoder_with_padding_in_evaluation():
    # The fused kernel of PyTorch's encoder reads the linear layers' weights itself, past any module.
    model = randomised(nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, H, batch_first=True), 2))
    x, padding = torch.randn(2, 5, D), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        y = model(x, src_key_padding_mask=padding)
        smoe.modulize(model, 4, score="sum", layers=[1])
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[~padding], y[~padding], atol=1e-5, rtol=1e-5)
        smoe.demodulize(model)
        assert torch.equal(model(x, src_key_padding_mask=padding), y)
    assert model.use_nested_tensor and model.layers[1].activation_relu_or_gelu == 1


@pytest.mark.parametrize("make", [sequential, TimmMlp])
def test_dropout_inside_is_kept_and_unbiased(make):
    torch.manual_seed(0)
    model = randomised(make(0.25))
    x = torch.randn(64, D)
    y = model(x)
    if make is TimmMlp:
        model.drop2.p = 0.0
    dense = torch.stack([model.train()(x) for _ in range(400)])
    smoe.modulize(model, 4, score="sum")
    ((_, layer),) = smoe.smoe_layers(model)
    assert layer.experts.dropout == pytest.approx(0.25, abs=1e-3)
    cut = torch.stack([model.train()(x) for _ in range(400)])
    # The same mean and the same spread, and none when evaluating.
    torch.testing.assert_close(cut.mean(0), y, atol=0.15, rtol=0.1)
    torch.testing.assert_close(cut.std(0).mean(), dense.std(0).mean(), rtol=0.05, atol=0)
    torch.testing.assert_close(model.eval()(x), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_under_dropout_are_of_the_units_that_were_kept(gated):
    layer = smoe.SMoE(D, H, 4, 2, dropout=0.5, activation="gelu", score="sum", gated=gated, seed=0).double()
    x = torch.randn(6, D, dtype=torch.double, requires_grad=True)

    def forward(x):
        torch.manual_seed(3)
        return layer(x)

    assert torch.autograd.gradcheck(forward, x)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_no_dropout_is_exact_in_training():
    torch.manual_seed(0)
    model, x = randomised(sequential(0.0)).train(), torch.randn(5, D)
    y = model(x)
    torch.testing.assert_close(smoe.modulize(model, 4, score="sum")(x), y, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rate", [-0.1, 1.5, True, "half"])
def test_dropout_rate_is_checked(rate):
    with pytest.raises(ValueError, match="dropout is .*; it must be a rate from 0 to 1"):
        smoe.SMoE(D, H, 4, dropout=rate)


@pytest.mark.parametrize("layers", ["last", [4], [-1], [0, 0], [], [True], [1.0]])
def test_wrong_choice_of_layers(layers):
    model = FlatModel()
    with pytest.raises(ValueError, match="^layers is "):
        smoe.modulize(model, 4, layers=layers)
    assert not smoe.smoe_layers(model)


def test_chosen_layers_alone_are_exchanged():
    model = smoe.modulize(FlatModel(), 4, layers="later")
    assert [name for name, _ in smoe.smoe_layers(model)] == ["blocks.2.down.mlp", "blocks.3.down.mlp"]
    assert type(model.blocks[0].up) is nn.Linear


def test_routers_differ_between_layers_and_repeat_with_the_seed():
    first, second = (smoe.modulize(FlatModel(), 4, seed=3) for _ in range(2))
    weights = [[layer.router.weight for _, layer in smoe.smoe_layers(model)] for model in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert not torch.equal(weights[0][0], weights[0][1])


class NormInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.norm, self.fc2 = nn.Linear(D, H), nn.ReLU(), nn.LayerNorm(H), nn.Linear(H, D)

    def forward(self, x):
        return self.fc2(self.norm(self.act(self.fc1(x))))


def test_one_unknown_among_known_changes_nothing():
    model = nn.ModuleDict({"good": sequential(), "bad": NormInside()})
    before = str(model)
    with pytest.raises(ValueError, match=r"bad \(NormInside\): .*; smoe.register_mlp.*nothing was changed") as error:
        smoe.modulize(model, 4)
    assert str(model) == before and "\n" not in str(error.value) and "good" not in str(error.value)


def test_width_that_does_not_divide_changes_nothing():
    wide = nn.Sequential(nn.Linear(D, 60), nn.ReLU(), nn.Linear(60, D))
    model = nn.ModuleDict({"a": sequential(), "b": wide})
    before = str(model)
    with pytest.raises(ValueError, match=r"^b\.2: d_hidden is 60, which num_experts = 16 does not divide"):
        smoe.modulize(model, 16)
    assert str(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, "top_k is 5; it must be a whole number from 1 to num_experts = 4"),
        ({"router": "hash"}, "router is 'hash'"),
        ({"score": "softmax"}, "score is 'softmax'"),
        ({"activation": "relu"}, "activation is no option of modulize"),
    ],
)
def test_wrong_options_change_nothing(options, message):
    model = sequential()
    with pytest.raises(ValueError, match=message):
        smoe.modulize(model, 4, **options)
    assert type(model[0]) is nn.Linear and model[0].weight.device.type == "cpu"


def test_experts_and_k_per_layer_are_in_the_models_order(tmp_path):
    model = nn.Sequential(*(sequential() for _ in range(3)))
    x = torch.randn(5, D)
    dense = model(x)
    smoe.modulize(model, [2, 8, 4], score="sum")
    torch.testing.assert_close(model(x), dense)
    smoe.demodulize(model)
    smoe.modulize(model, [8, 2], layers=[2, 0], top_k=(3, 1), score="sum", seed=0)
    layers = [layer for _, layer in smoe.smoe_layers(model)]
    assert [(layer.num_experts, layer.top_k) for layer in layers] == [(8, 3), (2, 1)]  # the model's order
    smoe.save_pretrained(model, tmp_path)
    loaded = smoe.from_pretrained(tmp_path, model=nn.Sequential(*(sequential() for _ in range(3))))
    assert smoe.get_top_k(loaded) == [3, 1]
    assert torch.equal(loaded(x), model(x))


def test_model_without_mlps_names_what_was_looked_at():
    for model, seen in [
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), r"0 \(Linear\)"),
        (nn.Sequential(nn.Linear(4, 16), nn.Softmax(-1), nn.Linear(16, 4)), r"the model itself \(Sequential\)"),
        (nn.Sequential(nn.Linear(4, 16), nn.PReLU(), nn.Linear(16, 4)), r"the model itself \(Sequential\)"),
        (nn.Conv2d(3, 3, 1), "no linear layer at all"),
    ]:
        with pytest.raises(ValueError, match=seen):
            smoe.modulize(model, 4)


def test_twice_is_an_error_and_so_is_back_from_nothing():
    model = smoe.modulize(sequential(), 4)
    with pytest.raises(ValueError, match="has SMoE layers already"):
        smoe.modulize(model, 4)
    smoe.demodulize(model)
    with pytest.raises(ValueError, match="has no SMoE layer that smoe.modulize made"):
        smoe.demodulize(model)


def test_shared_mlp_is_cut_once_in_all_its_places():
    shared = sequential()
    model = nn.Sequential(shared, nn.LayerNorm(D), shared).eval()
    x = torch.randn(3, D)
    y = model(x)
    smoe.modulize(model, 4, score="sum")
    assert len(smoe.smoe_layers(model)) == 1
    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-5)
    smoe.demodulize(model)
    assert torch.equal(model(x), y)


def test_tied_weights_of_different_layers_are_refused():
    model = nn.Sequential(sequential(), sequential())
    model[1][0].weight = model[0][0].weight
    with pytest.raises(ValueError, match=r"1\.0 shares its weight"):
        smoe.modulize(model, 4)


def test_frozen_weights_stay_frozen():
    model = sequential()
    model[0].requires_grad_(False)
    ((_, layer),) = smoe.smoe_layers(smoe.modulize(model, 4))
    assert not layer.experts.up.requires_grad and layer.experts.down.requires_grad
    smoe.demodulize(model)
    assert not model[0].weight.requires_grad and model[3].weight.requires_grad


def test_missing_biases_stay_missing():
    model = smoe.modulize(FlatModel(), 4)
    experts = smoe.smoe_layers(model)[0][1].experts
    assert experts.up_bias is not None and experts.down_bias is None


def test_a_copy_is_independent_and_the_trial_leaves_no_trace():
    model = ConvNeXtBlock().train()
    model.dwconv = nn.Sequential(model.dwconv, nn.BatchNorm2d(D))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    find.find_mlps(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)
    assert all(module.training and "forward" not in vars(module) for module in model.modules())

    smoe.modulize(model.eval(), 4)
    twin, x = copy.deepcopy(model), torch.randn(2, D, 8, 8)
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        smoe.smoe_layers(twin)[0][1].experts.down.zero_()
    assert not torch.equal(twin(x), model(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: smoe.set_top_k(model, 3), "3.mlp|3 activates 3 of 4 experts"),
        (
            lambda model: setattr(model[3].mlp.router, "score", "softmax_after_topk"),
            "weighs its experts by score='soft",
        ),
        (lambda model: setattr(model[3].mlp, "output_scale", 2.0), "multiplies its output by 2.0"),
    ],
)
def test_back_from_what_a_dense_mlp_does_not_compute_is_said(change, message):
    model = smoe.modulize(sequential(), 4, score="sum")
    change(model)
    with pytest.warns(UserWarning, match=message) as caught:
        smoe.demodulize(model)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)


def test_back_from_the_sum_of_all_experts_says_nothing(recwarn):
    model = smoe.modulize(sequential(), 4, score="sum", top_k=2, seed=0)
    x = torch.randn(5, D)
    smoe.slim(model, smoe.vote(model, [x]), keep=2)  # k of N is all there is
    y = model.eval()(x)
    smoe.demodulize(model)
    torch.testing.assert_close(model(x), y)
    assert not recwarn.list


def test_ddp_comes_afterwards():
    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self, module):  # without a process group
            nn.Module.__init__(self)
            self.module = module

    with pytest.raises(ValueError, match="the model is DDP, which can't follow new parameters; modulize what it wraps"):
        smoe.modulize(Wrapped(sequential()), 4)
