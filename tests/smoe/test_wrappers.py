"""What other libraries do to a model with SMoE layers: PEFT's adapters, accelerate's hooks, DataParallel's replicas."""

import copy
import importlib

import peft
import pytest
import torch
import transformers
from accelerate import cpu_offload, hooks
from tiny_models import with_lora
from torch import nn

import smoe
import smoe.flops
from smoe import SMoE, record_routing, set_top_k
from smoe.compute import PATHS

N, D = 8, 16
IDS = torch.arange(12).view(2, 6)
EXPERTS = ["experts.up", "experts.gate", "experts.down"]


class Tiny(nn.Module):
    """Embedding, a residual SMoE layer, an output layer."""

    def __init__(self, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, D)
        self.mlp = SMoE(D, 64, N, 2, seed=0, gated=True, **options)
        self.out = nn.Linear(D, 5)

    def forward(self, ids):
        x = self.embedding(ids)
        return self.out(x + self.mlp(x))


class Wrapper(nn.Module):
    """Like PEFT's ParamWrapper: it can be called, and has no attribute of the module that it holds."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, *args, **kwargs):
        return self.base_layer(*args, **kwargs)


@pytest.mark.parametrize("router", ["random", "learned", "hash"])
def test_a_wrapper_needs_no_attributes(router):
    model, plain = (Tiny(router=router, vocab_size=20, dropout=0.5) for _ in range(2))
    model.mlp.router, model.mlp.experts = Wrapper(model.mlp.router), Wrapper(model.mlp.experts)
    found = []
    for each in (model, plain):
        set_top_k(each, 3)
        assert smoe.get_top_k(each) == 3 and each.mlp.needs_token_ids == (router == "hash")
        torch.manual_seed(2)  # of the dropout
        with record_routing(each) as routings:
            y = each.mlp(each.embedding(IDS), token_ids=IDS)
        y.sum().backward()
        found.append((y, routings[0].indices, each.embedding.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    model.mlp.reset_parameters(0.0)
    assert not model.mlp.experts.base_layer.up.any()
    with pytest.raises(ValueError, match="^slim: Wrapper wraps the router of layer mlp; do it before get_peft_model"):
        smoe.slim(model, {"mlp": torch.ones(N)})


# ---- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["auto", *(path for path in PATHS if path != "grouped_mm")])  # that needs bfloat16
@pytest.mark.parametrize("k", [2, N])
def test_lora_on_experts_computes_what_the_merged_model_does(compute, k):
    model = with_lora(Tiny(compute=compute), parameters=EXPERTS)
    merged = copy.deepcopy(model).merge_and_unload()
    merged.requires_grad_()
    before = Tiny(compute=compute)
    for each in (model, merged, before):
        set_top_k(each, k)
    y = model(IDS)
    torch.testing.assert_close(y, merged(IDS), rtol=0, atol=1e-6)
    assert not torch.allclose(y, before(IDS), atol=1e-2)
    # The gradients of the factors, by the chain rule from the gradients of the merged weights.
    y.square().sum().backward()
    merged(IDS).square().sum().backward()
    for module in (module for module in model.modules() if hasattr(module, "get_delta_weight")):
        factors = [module.lora_A["default"].weight, module.lora_B["default"].weight]
        grad = merged.mlp.experts.get_parameter(module.parameter_name).grad
        wanted = torch.autograd.grad(module.get_delta_weight("default"), factors, grad)
        for factor, want in zip(factors, wanted, strict=True):
            torch.testing.assert_close(factor.grad, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("parameters", [["router.weight"], ["router.weight", "experts.up"], ["experts.up_bias"]])
def test_lora_on_a_router_or_a_bias(parameters):
    model = with_lora(Tiny(router="learned"), parameters=parameters)
    set_top_k(model, 3)
    with record_routing(model) as routings:
        y = model(IDS)
    assert [routing.indices.shape for routing in routings] == [(12, 3)] and smoe.get_top_k(model) == 3
    torch.testing.assert_close(y, model.merge_and_unload()(IDS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("part", ["router", "experts", "mlp"])
def test_modules_to_save_take_k(part):
    """PEFT runs a copy of the module, and k must reach it."""
    config = peft.LoraConfig(target_modules=["out"], modules_to_save=[part])
    model = peft.get_peft_model(Tiny(router="learned"), config)
    for k in (5, 1):
        set_top_k(model, k)
        with record_routing(model) as routings:
            y = model(IDS)
        assert [routing.indices.shape for routing in routings] == [(12, k)]
        plain = Tiny(router="learned")
        set_top_k(plain, k)
        assert torch.equal(y, plain(IDS))  # LoRA starts at zero
    y.sum().backward()
    assert any(part in name and p.grad is not None for name, p in model.named_parameters())


def test_an_adapter_is_saved_and_loaded(tmp_path):
    model = with_lora(Tiny(), parameters=EXPERTS)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(Tiny(), tmp_path)
    assert torch.equal(loaded(IDS), model(IDS))
    with model.disable_adapter():
        assert torch.equal(model(IDS), Tiny()(IDS))


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_lora_on_modulized_transformers(kind):
    torch.manual_seed(0)
    if kind == "bert":
        sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 64}
        model = transformers.BertForMaskedLM(transformers.BertConfig(num_attention_heads=2, **sizes))
        inputs = {"input_ids": IDS}
    else:
        sizes = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 2}
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(decoder_start_token_id=0, **sizes))
        inputs = {"input_ids": IDS, "labels": IDS}
    model = smoe.modulize(model.eval(), N, top_k=2, seed=0)
    before = model(**inputs).logits
    model = with_lora(model, parameters=["experts.up", "experts.down"])
    y = model(**inputs).logits
    assert not torch.allclose(y, before, atol=1e-3)
    torch.testing.assert_close(y, model.merge_and_unload()(**inputs).logits, rtol=0, atol=1e-5)


def test_what_needs_the_weights_themselves_says_to_merge_first(tmp_path):
    def modulized():
        torch.manual_seed(0)
        mlp = nn.Sequential(nn.Linear(D, 64), nn.ReLU(), nn.Linear(64, D))
        return smoe.modulize(nn.Sequential(mlp), N, score="sum")

    model = with_lora(modulized(), parameters=["experts.up"])
    (name, _), *_ = smoe.smoe_layers(model)
    x = torch.randn(3, D)
    refused = {
        "slim": lambda m: smoe.slim(m, {name: torch.ones(N)}, keep=4),
        "demodulize": smoe.demodulize,
        "save_pretrained": lambda m: smoe.save_pretrained(m, tmp_path / "new"),
        "count": lambda m: smoe.flops.count(m, (x,)),
    }
    for doing, call in refused.items():
        with pytest.raises(ValueError) as caught:
            call(model)
        assert str(caught.value) == (
            f"{doing}: ParamWrapper wraps the experts of layer {name}; do it before get_peft_model, or merge the "
            "adapter first (model = model.merge_and_unload())"
        )
    assert not (tmp_path / "new").exists()
    merged = model.merge_and_unload()
    y = merged(x)
    torch.testing.assert_close(smoe.demodulize(merged)(x), y)


# ---- accelerate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["random", "learned"])
@pytest.mark.parametrize("offload_buffers", [False, True])
def test_offloaded_weights(router, offload_buffers):
    model = Tiny(router=router)
    wanted = model(IDS)
    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=offload_buffers)
    assert model.mlp.experts.up.is_meta
    with record_routing(model) as routings:
        assert torch.equal(model(IDS), wanted)
    assert len(routings) == 1
    with pytest.raises(ValueError) as caught:
        smoe.slim(model, {"mlp": torch.arange(N)}, keep=4)
    assert str(caught.value) == (
        f"slim: accelerate has offloaded the {'router' if router == 'learned' or offload_buffers else 'experts'} of "
        "layer mlp; call accelerate.hooks.remove_hook_from_submodules(model) first"
    )
    hooks.remove_hook_from_submodules(model)
    assert torch.equal(model(IDS), wanted)
    assert smoe.slim(model, {"mlp": torch.arange(N)}, keep=4).mlp.num_experts == 4


def test_hooks_on_every_module():
    model = Tiny()
    wanted = model(IDS)
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    with record_routing(model) as routings:
        y = model(IDS)
    y.sum().backward()
    assert torch.equal(y, wanted) and len(routings) == 1 and model.mlp.experts.up.grad.any()


# ---- DataParallel ----------------------------------------------------------------------------------------------------


@pytest.fixture
def replicate(monkeypatch):
    """DataParallel's replicas, all on the CPU: of its code only the broadcast to GPUs is replaced."""
    module = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)
    broadcast = lambda tensors, devices, detach: [[t.view_as(t) for t in tensors] for _ in devices]  # noqa: E731
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    return module.replicate


@pytest.mark.parametrize("router", ["random", "learned", "uniform"])
def test_replicas_compute_their_part_of_the_batch(replicate, router):
    model = Tiny(router=router)
    set_top_k(model, N if router == "uniform" else 3)
    wanted = model(IDS)
    wanted.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with record_routing(model) as routings:
        replicas = replicate(model, [0, 1])
        y = torch.cat([replica(part) for replica, part in zip(replicas, IDS.chunk(2), strict=True)])
    assert [len(routing.indices) for routing in routings] == [6, 6]
    torch.testing.assert_close(y, wanted)
    y.square().sum().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)
