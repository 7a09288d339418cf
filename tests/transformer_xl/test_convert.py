"""Weights of the reference implementation and of the release, and the numbers they must give."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

import smoe
from transformer_xl import TransformerXL, TransformerXLConfig
from transformer_xl.convert import from_reference, from_release, main

FIXTURE = Path(__file__).parent / "fixtures" / "reference.safetensors"
D_MODEL, EXPERTS, EXPERT_HIDDEN = 16, 4, 8


@pytest.fixture
def reference() -> dict[str, torch.Tensor]:
    return load_file(FIXTURE)


def weights(fixture: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix("weights."): value for key, value in fixture.items() if key.startswith("weights.")}


def release_weights(reference: dict[str, torch.Tensor], layers: tuple[int, ...] = (0, 1)) -> dict[str, torch.Tensor]:
    """The reference's weights with the MLPs of `layers` replaced by random experts in fastmoe's layout."""
    generator = torch.Generator().manual_seed(0)
    state = weights(reference)
    for i in layers:
        for key in ("0.weight", "0.bias", "3.weight", "3.bias"):
            del state[f"layers.{i}.pos_ff.CoreNet.{key}"]
        for key, shape in {
            "gate.gate.weight": (EXPERTS, D_MODEL),
            "gate.gate.bias": (EXPERTS,),
            "experts.htoh4.weight": (EXPERTS, EXPERT_HIDDEN, D_MODEL),
            "experts.htoh4.bias": (EXPERTS, EXPERT_HIDDEN),
            "experts.h4toh.weight": (EXPERTS, D_MODEL, EXPERT_HIDDEN),
            "experts.h4toh.bias": (EXPERTS, D_MODEL),
        }.items():
            state[f"layers.{i}.pos_ff.{key}"] = torch.randn(shape, generator=generator)
    return state


def test_reference_numbers_over_three_segments(reference: dict[str, torch.Tensor]) -> None:
    config, state = from_reference(weights(reference))
    sizes = dict(vocab_size=20, num_layers=2, d_model=16, num_heads=2, d_head=8, d_hidden=32)
    assert config == TransformerXLConfig(**sizes)
    model = TransformerXL(config)
    model.load_state_dict(state)
    model.eval()
    memory = None
    for segment in range(3):
        ids, targets = reference[f"input.{segment}"], reference[f"target.{segment}"]
        loss, logits, memory = model(ids, targets, memory, memory_length=6)
        close = {"rtol": 0, "atol": 1e-4}
        torch.testing.assert_close(logits.log_softmax(-1), reference[f"log_probs.{segment}"], **close)
        torch.testing.assert_close(loss, reference[f"nll.{segment}"].mean(), **close)
        torch.testing.assert_close(memory, reference[f"memory.{segment}"], **close)


def test_a_data_parallel_prefix_is_dropped(reference: dict[str, torch.Tensor]) -> None:
    plain = from_reference(weights(reference))[1]
    wrapped = from_reference({f"module.{key}": value for key, value in weights(reference).items()})[1]
    assert wrapped.keys() == plain.keys()


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_release_experts_compute_the_same(reference: dict[str, torch.Tensor], top_k: int) -> None:
    source = release_weights(reference)
    config, state = from_release(source)
    assert config.d_hidden == EXPERTS * EXPERT_HIDDEN
    model = TransformerXL(config, lambda i: smoe.SMoE(config.d_model, config.d_hidden, EXPERTS, top_k))
    model.load_state_dict(state)

    mlp = {key.removeprefix("layers.1.pos_ff."): value for key, value in source.items()}
    x = torch.randn(7, D_MODEL)
    scores, chosen = F.linear(x, mlp["gate.gate.weight"], mlp["gate.gate.bias"]).topk(top_k)
    expected = torch.zeros_like(x)
    for token in range(len(x)):
        for weight, e in zip(scores[token].softmax(0), chosen[token], strict=True):
            hidden = F.linear(x[token], mlp["experts.htoh4.weight"][e], mlp["experts.htoh4.bias"][e]).relu()
            expected[token] += weight * F.linear(hidden, mlp["experts.h4toh.weight"][e], mlp["experts.h4toh.bias"][e])
    torch.testing.assert_close(model.layers[1].mlp(x), expected, rtol=1e-4, atol=1e-4)


def test_release_may_mix_dense_and_sparse_layers(reference: dict[str, torch.Tensor]) -> None:
    config, state = from_release(release_weights(reference, layers=(1,)))
    assert "layers.0.mlp.up.weight" in state and "layers.1.mlp.experts.up" in state
    assert config.d_hidden == EXPERTS * EXPERT_HIDDEN


def test_missing_and_unknown_keys_are_named(reference: dict[str, torch.Tensor]) -> None:
    state = weights(reference)
    state["layers.1.pos_ff.norm"] = state.pop("layers.1.dec_attn.o_net.weight")
    message = r"missing layers\.1\.dec_attn\.o_net\.weight; unknown layers\.1\.pos_ff\.norm$"
    for convert in (from_reference, from_release):
        with pytest.raises(ValueError, match=message):
            convert(state)
    with pytest.raises(ValueError, match=r"missing .*layers\.0\.\*"):
        from_reference({})
    with pytest.raises(ValueError, match=r"unknown .*layers\.0\.pos_ff\.gate\.gate\.weight"):
        from_reference(release_weights(reference))


def test_wrong_sizes_and_untied_weights_are_named(reference: dict[str, torch.Tensor]) -> None:
    state = weights(reference)
    with pytest.raises(ValueError, match=r"layers\.1\.dec_attn\.r_net\.weight has shape \(3, 16\), .* \(16, 16\)"):
        from_reference(state | {"layers.1.dec_attn.r_net.weight": torch.zeros(3, 16)})
    with pytest.raises(ValueError, match=r"crit\.out_layers\.0\.weight differs"):
        from_reference(state | {"crit.out_layers.0.weight": torch.zeros(20, 16)})


def test_command_line(reference: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state_file, output = tmp_path / "in.pt", tmp_path / "out.safetensors"
    torch.save(weights(reference), state_file)
    assert main([str(state_file), str(output)]) == 0
    config, state = from_reference(weights(reference))
    with safe_open(output, framework="pt") as saved:
        assert json.loads(saved.metadata()["config"]) == dataclasses.asdict(config)
    assert load_file(output).keys() == state.keys()

    # A whole pickled model: its tensors are read, whatever its classes are.
    layers = torch.nn.Module()
    for key, value in weights(reference).items():
        *path, name = key.split(".")
        module = layers
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]
        module.register_buffer(name, value)
    whole_model, same = tmp_path / "model.pt", tmp_path / "same.safetensors"
    torch.save(layers, whole_model)
    assert main([str(whole_model), str(same)]) == 0
    assert same.read_bytes() == output.read_bytes()

    capsys.readouterr()
    output.unlink()
    for other, message in (
        (torch.nn.Linear(2, 2), "missing"),
        ({"step": 3}, "no state dict"),
        (print, "no state dict"),
    ):
        torch.save(other, whole_model)
        assert main([str(whole_model), str(output)]) == 1
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1
    assert not output.exists()


def test_absurd_keys_and_shapes_are_named_at_once(reference: dict[str, torch.Tensor]) -> None:
    state = release_weights(reference)
    for change, message in (
        ({"layers.999999999.a\x1b": torch.zeros(1)}, r"unknown 'layers\.999999999\.a\\x1b'"),
        ({f"layers.{'9' * 6000}.a": torch.zeros(1)}, "unknown 'layers.99"),
        ({"layers.0.pos_ff.gate.gate.weight": torch.zeros(())}, r"has shape \(\), but must be \(any, 16\)"),
        ({"layers.0.pos_ff.gate.gate.weight": torch.zeros(0, 16)}, "has no expert"),
        ({"layers.0.pos_ff.experts.htoh4.weight": torch.zeros(())}, r"has shape \(\), but must be \(any, any, any\)"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            from_release(state | change)
        assert len(str(error.value)) < 3000
