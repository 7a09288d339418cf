"""The Transformer-XL model: memory, causality, relative positions, initialisation."""

import dataclasses

import pytest
import torch
from torch import nn

from transformer_xl import TransformerXL, TransformerXLConfig
from transformer_xl.attention import (
    RelativeAttention,
    relative_distances,
    relative_shift,
    sinusoids,
)

TINY = TransformerXLConfig(
    vocab_size=20,
    num_layers=2,
    d_model=16,
    num_heads=2,
    d_head=8,
    d_hidden=32,
    dropout=0.0,
    init_std=0.3,
)


def tiny_model(**changes) -> TransformerXL:
    torch.manual_seed(0)
    return TransformerXL(dataclasses.replace(TINY, **changes)).double()


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(
        0,
        TINY.vocab_size,
        (batch, length),
        generator=torch.Generator().manual_seed(seed),
    )


@pytest.mark.parametrize(("t", "s"), [(1, 1), (1, 5), (4, 4), (3, 7), (7, 8)])
def test_relative_shift_equals_a_loop(t: int, s: int) -> None:
    by_distance = torch.randn(2, 3, t, s + 1)
    distances = relative_distances(t, s).tolist()
    shifted = relative_shift(by_distance, t, s)
    for i in range(t):
        for j in range(s - t + i + 1):
            column = distances.index(s - t + i - j)
            torch.testing.assert_close(shifted[..., i, j], by_distance[..., i, column], rtol=0, atol=0)
    assert shifted.untyped_storage().data_ptr() == by_distance.untyped_storage().data_ptr()


def naive_attention(
    layer: RelativeAttention,
    x: torch.Tensor,
    context: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
) -> torch.Tensor:
    """Equation by equation, one query and head at a time (Dai et al. 2019, section 3.3)."""
    t, s, d = x.shape[1], context.shape[1], x.shape[2]
    heads, d_head = layer.num_heads, layer.d_head
    rows = []
    for b in range(x.shape[0]):
        for i in range(t):
            seen = s - t + i + 1
            mixed = []
            for h in range(heads):
                part = slice(h * d_head, (h + 1) * d_head)
                part_v = slice((heads + h) * d_head, (heads + h + 1) * d_head)
                q = layer.query.weight[part] @ x[b, i]
                scores = []
                for j in range(seen):
                    k = layer.key_value.weight[part] @ context[b, j]
                    distance = torch.tensor([float(seen - 1 - j)])
                    r = layer.position.weight[part] @ sinusoids(distance, d)[0].to(x)
                    scores.append(((q + u[h]) @ k + (q + v[h]) @ r) / d_head**0.5)
                weights = torch.stack(scores).softmax(0)
                mixed.append(sum(weights[j] * (layer.key_value.weight[part_v] @ context[b, j]) for j in range(seen)))
            rows.append(layer.output.weight @ torch.cat(mixed))
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("memory_length", [0, 3])
def test_attention_and_its_gradients_equal_a_loop(memory_length: int) -> None:
    torch.manual_seed(0)
    d, t = 6, 4
    layer = RelativeAttention(d, num_heads=2, d_head=3).double()
    u, v = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x = torch.randn(2, t, d, dtype=torch.float64, requires_grad=True)
    context = torch.cat([torch.randn(2, memory_length, d, dtype=torch.float64), x], dim=1)
    positions = sinusoids(relative_distances(t, memory_length + t), d).double()
    inputs = [x, u, v, *layer.parameters()]

    fast = layer(x, context, positions, u, v)
    slow = naive_attention(layer, x, context, u, v)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-6)  # frequencies are float32
    direction = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad(fast, inputs, direction),
        torch.autograd.grad(slow, inputs, direction),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_one_layer_with_memory_equals_the_whole_context() -> None:
    model, ids = tiny_model(num_layers=1), tokens(3, 17)
    whole = model(ids).logits
    first = model(ids[:, :7], memory_length=50)
    second = model(ids[:, 7:12], memory=first.memory, memory_length=50)
    third = model(ids[:, 12:], memory=second.memory)
    torch.testing.assert_close(torch.cat([first.logits, second.logits, third.logits], 1), whole)


def test_memory_reaches_every_layer() -> None:
    """Hidden states of a causal model don't depend on what follows: two segments equal one in every layer."""
    model, ids = tiny_model(num_layers=3), tokens(2, 12)
    whole = model(ids, memory_length=12)
    first = model(ids[:, :5], memory_length=5)
    second = model(ids[:, 5:], memory=first.memory, memory_length=12)
    torch.testing.assert_close(second.logits, whole.logits[:, 5:])
    torch.testing.assert_close(second.memory, whole.memory)
    assert not second.memory.requires_grad


@pytest.mark.parametrize(
    ("available", "asked", "kept"),
    [(0, 0, 0), (0, 3, 3), (4, 6, 6), (4, 100, 9), (4, 0, 0)],
)
def test_memory_lengths(available: int, asked: int, kept: int) -> None:
    model = tiny_model()
    memory = model(tokens(2, 4), memory_length=available).memory
    assert memory.shape == (2, 2, available, 16)
    assert model(tokens(2, 5), memory=memory, memory_length=asked).memory.shape == (
        2,
        2,
        kept,
        16,
    )


def test_the_future_does_not_matter() -> None:
    model, ids = tiny_model(), tokens(1, 10)
    memory = model(tokens(1, 6, seed=2), memory_length=6).memory
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % TINY.vocab_size
    before, after = (
        model(ids, memory=memory).logits,
        model(changed, memory=memory).logits,
    )
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=0, atol=1e-12)
    assert (before[:, 6:] - after[:, 6:]).abs().amin(dim=(0, 2)).gt(0).all()


def test_loss_is_mean_nats() -> None:
    model, ids, targets = tiny_model(), tokens(2, 6), tokens(2, 6, seed=2)
    output = model(ids, targets)
    picked = output.logits.log_softmax(-1).gather(2, targets[:, :, None])
    torch.testing.assert_close(output.loss, -picked.mean())
    assert model(ids).loss is None


def test_autocast_keeps_float32_outputs() -> None:
    model, ids = tiny_model(init_std=0.02).float(), tokens(2, 6)
    exact = model(ids, ids, memory_length=6)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, ids, memory_length=6)
    assert output.loss.dtype == output.logits.dtype == torch.float32
    torch.testing.assert_close(output.logits, exact.logits, rtol=0, atol=0.02)
    torch.testing.assert_close(output.memory, exact.memory, rtol=0, atol=0.1)


def test_without_gradients_the_same_is_computed() -> None:
    model, ids = tiny_model(), tokens(2, 6)
    with torch.no_grad():
        memory = model(ids, memory_length=6).memory
        without = model(ids, ids, memory=memory, memory_length=3)
    output = model(ids, ids, memory=memory, memory_length=3)
    torch.testing.assert_close(without.logits, output.logits)
    torch.testing.assert_close(without.memory, output.memory)


def test_every_parameter_learns() -> None:
    model = tiny_model()
    model(tokens(2, 6), tokens(2, 6, seed=2)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_initialisation() -> None:
    torch.manual_seed(3)
    model = TransformerXL(TransformerXLConfig(num_layers=1, d_hidden=512, init_std=0.02))
    state = model.state_dict()
    for name, value in state.items():
        centre = 1.0 if "norm.weight" in name else 0.0
        std = 0.0 if name.endswith(".bias") or name == "output_bias" else 0.02
        assert abs(value.mean() - centre) < 0.005, name
        spread = value.std(correction=0).item()
        assert spread == 0 if std == 0 else abs(spread - std) < 0.003, name
    torch.manual_seed(3)
    again = TransformerXL(model.config).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in state.items())


class RecordingMLP(nn.Module):
    needs_token_ids = True

    def __init__(self) -> None:
        super().__init__()
        self.std = None
        self.weight = nn.Parameter(torch.zeros(1))

    def reset_parameters(self, std: float = 1.0) -> None:
        self.std = std

    def forward(self, x: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        self.seen = token_ids
        return x * self.weight


def test_own_mlps_get_their_std_and_token_ids() -> None:
    built: list[RecordingMLP] = []

    def make_mlp(layer_index: int) -> nn.Module:
        assert layer_index == len(built)
        built.append(RecordingMLP())
        return built[-1]

    ids = tokens(2, 5)
    TransformerXL(TINY, make_mlp)(ids)
    assert [mlp.std for mlp in built] == [TINY.init_std] * TINY.num_layers
    assert all(torch.equal(mlp.seen, ids) for mlp in built)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 0),
        ("d_model", 15),
        ("vocab_size", 2.5),
        ("dropout", 1.0),
        ("dropout", "0"),
        ("init_std", 0),
    ],
)
def test_config_names_the_bad_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value!r}") as raised:
        TransformerXLConfig(**{field: value})
    assert "\n" not in str(raised.value)


def test_bad_inputs_are_named() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="targets has shape"):
        model(tokens(2, 5), tokens(2, 4))
    with pytest.raises(ValueError, match=r"memory has shape .* must be \(2, 2, any, 16\)"):
        model(tokens(2, 5), memory=torch.zeros(2, 3, 4, 16))
    with pytest.raises(ValueError, match="input_ids has shape"):
        model(torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="memory_length is -1"):
        model(tokens(2, 5), memory_length=-1)
