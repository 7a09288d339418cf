"""Which layers ``chosen_layers`` selects."""

import pytest
import torch
from tiny_models import tiny

import smoe
from smoe.modulize.layers import LAYERS, chosen_layers


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [
        ("all", 4, [0, 1, 2, 3]),
        ("early", 4, [0, 1]),  # the paper's options for 4 layers, Figure 5 (e)
        ("middle", 4, [1, 2]),
        ("later", 4, [2, 3]),
        ("every-2", 4, [1, 3]),
        ("later", 12, list(range(6, 12))),
        ("middle", 12, list(range(3, 9))),
        ([3, 0], 4, [0, 3]),
        ("later", 1, [0]),
    ],
)
def test_choice_of_layers(layers, count, expected):
    assert chosen_layers(layers, count) == expected


def test_every_name_selects_something():
    assert all(chosen_layers(name, 2) for name in LAYERS)


@pytest.mark.parametrize("layers", ["last", [4], [-1], [0, 0], [], [True], [1.0]])
def test_wrong_choice_names_the_field(layers):
    with pytest.raises(ValueError, match="^layers is "):
        chosen_layers(layers, 4)


# ---- N and k of each layer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_experts, top_k",
    [
        ([16, 4], [5, 4]),
        ({"layers.1": 4, "model.layers.0.mlp.down_proj": 16}, {"layers.0.mlp": 5, "layers.1.mlp.down_proj.mlp": 4}),
    ],
)
def test_experts_and_k_per_layer(num_experts, top_k, tmp_path):
    dense = tiny("Llama")
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        wanted = dense(ids).logits
        model = smoe.modulize(tiny("Llama"), num_experts, score="sum", top_k=top_k, seed=0)
        assert [layer.num_experts for _, layer in smoe.smoe_layers(model)] == [16, 4]
        assert smoe.get_top_k(model) == [5, 4]
        smoe.save_pretrained(model, tmp_path)
        loaded = smoe.from_pretrained(tmp_path)
        assert smoe.get_top_k(loaded) == [5, 4]
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        with pytest.raises(ValueError, match="top_k is 5; it must be a whole number from 1 to num_experts = 4"):
            smoe.set_top_k(model, 5)
        assert smoe.get_top_k(model) == [5, 4]
        smoe.set_top_k(model, [16, 4])
        torch.testing.assert_close(model(ids).logits, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_experts": [16]}, r"num_experts is \[16\], 1 numbers; there are 2 layers, so it must be one number or 2"),
        ({"num_experts": [16, 3]}, "layers.1.mlp.down_proj: d_hidden is 64, which num_experts = 3 does not divide"),
        ({"top_k": [1, 2, 3]}, r"top_k is \[1, 2, 3\], 3 numbers; there are 2 layers"),
        (
            {"num_experts": [16, 4], "top_k": 5},
            "layers.1.mlp.down_proj: top_k is 5; it must be a whole number from 1 to",
        ),
        ({"top_k": {"layers.0": 2}}, "top_k has no entry for model.layers.1.mlp.down_proj; it must have one for each"),
        (
            {"top_k": {"layers.2": 2}},
            "top_k has the key 'layers.2', which names no layer; the layers are model",
        ),
        ({"top_k": {"mlp": 2}}, "top_k has the key 'mlp', which names model.layers.0.mlp.down_proj among 2"),
        ({"top_k": {"layers.0": 2, "0.mlp": 1}}, "'0.mlp', which names model.layers.0.mlp.down_proj again"),
    ],
)
def test_experts_and_k_that_do_not_fit_the_layers(options, message):
    model = tiny("Llama")
    with pytest.raises(ValueError, match=message):
        smoe.modulize(model, **options)
    assert not smoe.smoe_layers(model)
