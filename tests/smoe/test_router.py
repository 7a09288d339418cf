"""The routers: which experts they choose, with which weights, and what stays fixed."""

import hashlib
import subprocess
import sys

import pytest
import torch

from smoe import HashRouter, LearnedRouter, RandomRouter, SMoE, UniformRouter
from smoe.router import ROUTERS, SCORES, make_router

D, N, V, T = 16, 12, 300, 64


def build(kind: str, k: int = 3, score: str = "softmax_after_topk", seed: int | None = 5):
    return make_router(kind, D, N, k, score, vocab_size=V, seed=seed)


WITH_WEIGHTS = [kind for kind in ROUTERS if build(kind).state_dict()]  # a choice that the weights decide, nested in k
FIXED = [kind for kind in WITH_WEIGHTS if not list(build(kind).parameters())]


def digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


@pytest.mark.parametrize("k", [1, 5, N - 1, N])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("kind", ROUTERS)
def test_shape_dtype_and_sum_of_weights(kind, score, k):
    indices, weights, balance_loss = build(kind, k, score)(torch.randn(T, D), torch.randint(V, (T,)))
    assert indices.shape == weights.shape == (T, k)
    assert indices.dtype == torch.int64 and weights.dtype == torch.float32
    assert indices.min() >= 0 and indices.max() < N
    assert (indices.sort(-1).values.diff(dim=-1) > 0).all(), "an expert was chosen twice"
    assert (balance_loss is not None) == (kind == "learned")
    total = weights.sum(-1)
    if score == "sum":
        assert (weights == 1).all()
    elif score == "softmax_after_topk" or k == N:
        torch.testing.assert_close(total, torch.ones(T))
    elif kind in ("uniform", "hash"):
        torch.testing.assert_close(total, torch.full((T,), k / N))
    else:
        assert (total < 1).all() and (total > k / N - 1e-6).all()


@pytest.mark.parametrize("kind", ["random", "learned"])
def test_the_k_largest_logits_are_chosen(kind):
    router, x = build(kind), torch.randn(T, D)
    logits = x.double() @ router.weight.double().t() + router.bias
    for k in range(1, N):
        router.top_k = k
        chosen = torch.zeros(T, N, dtype=torch.bool).scatter_(1, router(x).indices, True)
        smallest_in = logits.masked_fill(~chosen, torch.inf).min(1).values
        largest_out = logits.masked_fill(chosen, -torch.inf).max(1).values
        assert (smallest_in >= largest_out).all()


@pytest.mark.parametrize("kind", WITH_WEIGHTS)
def test_the_choice_at_k_is_part_of_the_choice_at_k_plus_1(kind):
    router, x, ids = build(kind), torch.randn(T, D), torch.randint(V, (T,))
    before = [set() for _ in range(T)]
    for k in range(1, N + 1):
        router.top_k = k
        now = [set(row) for row in router(x, ids).indices.tolist()]
        assert all(len(b) == k and a <= b for a, b in zip(before, now, strict=True))
        before = now


def test_bias_takes_part_in_the_choice():
    router = build("random", k=1)
    router.bias[7] = 100.0
    assert (router(torch.randn(T, D)).indices == 7).all()


def test_fixed_router_is_buffers_alone():
    layer = SMoE(D, 24, N, 3, seed=5)
    assert list(layer.router.parameters()) == []
    assert {"router.weight", "router.bias"} <= layer.state_dict().keys()
    assert not layer.router.weight.requires_grad


@pytest.mark.parametrize("kind", FIXED)
def test_an_optimizer_step_with_decay_leaves_a_fixed_router_alone(kind):
    layer = SMoE(D, 24, N, 3, router=kind, vocab_size=V)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    layer(torch.randn(T, D), torch.randint(V, (T,))).square().sum().backward()
    optimizer.step()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("router"), name


@pytest.mark.parametrize("kind", WITH_WEIGHTS)
def test_one_seed_gives_one_router(kind):
    first = list(build(kind, seed=5).state_dict().values())
    torch.manual_seed(123)  # the global generator must not matter
    again = list(build(kind, seed=5).state_dict().values())
    other = list(build(kind, seed=6).state_dict().values())
    assert digest(*first) == digest(*again) != digest(*other)


def test_one_seed_gives_one_router_in_another_process():
    code = (
        "import hashlib, torch; from smoe.router import make_router\n"
        f"tensors = [make_router(kind, {D}, {N}, 3, vocab_size={V}, seed=5).state_dict().values()"
        " for kind in ('random', 'hash')]\n"
        "print(hashlib.sha256(b''.join(t.numpy().tobytes() for ts in tensors for t in ts)).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == digest(*build("random").state_dict().values(), *build("hash").state_dict().values())


def test_without_a_seed_the_global_generator_draws():
    torch.manual_seed(3)
    one, two = build("random", seed=None), build("random", seed=None)
    torch.manual_seed(3)
    assert torch.equal(build("random", seed=None).weight, one.weight) and not torch.equal(one.weight, two.weight)


def test_a_seed_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    for kind in ROUTERS:
        build(kind, seed=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_router_starts_as_in_the_release():
    router = RandomRouter(1000, 64, 2)
    assert router.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert (router.bias == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_fixed_router_is_never_rounded(dtype):
    """bfloat16 weights would be another router: about 1 token in 100 would get other experts."""
    layer = SMoE(D, 24, N, 3, seed=5)
    before = layer.router.weight.clone()
    layer.to(dtype)
    assert layer.experts.up.dtype == dtype
    assert torch.equal(layer.router.weight, before) and layer.router.bias.dtype == torch.float32
    assert "weight" in layer.router._buffers and "router.weight" in layer.state_dict()
    layer.to(torch.float32)
    assert torch.equal(layer.router.weight, before)


def test_fixed_router_moves_with_the_model():
    assert build("random").to("meta").weight.is_meta
    assert build("random").to("meta", torch.bfloat16).weight.is_meta


@pytest.mark.parametrize("kind", WITH_WEIGHTS)
def test_made_on_the_default_device(kind):
    with torch.device("meta"):
        router = build(kind)
    assert all(value.is_meta for value in router.state_dict().values())
    router = router.to_empty(device="cpu")
    router.load_state_dict(build(kind).state_dict())
    x, ids = torch.randn(T, D), torch.randint(V, (T,))
    assert torch.equal(router(x, ids).indices, build(kind)(x, ids).indices)


class EveryOther(RandomRouter):
    """Fixed numbers of its own."""

    def draw(self, std):
        return std * torch.eye(self.num_experts, self.weight.shape[1])


def test_fixed_numbers_of_ones_own_survive_the_meta_device():
    expected = 0.02 * torch.eye(N, D)
    assert torch.equal(EveryOther(D, N, 3).weight, expected)
    with torch.device("meta"):
        router = EveryOther(D, N, 3)
    assert router.weight.is_meta and torch.equal(router.to_empty(device="cpu").weight, expected)
    assert torch.equal(router.half().to("meta").to_empty(device="cpu").weight, expected)


# --- uniform ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4])
def test_uniform_is_uniform(k):
    router, tokens = UniformRouter(N, k), 20_000
    indices = router(torch.zeros(tokens, D)).indices
    counts = torch.bincount(indices.flatten(), minlength=N).double()
    expected = tokens * k / N
    # Drawing without replacement shrinks the variance by (N - k) / (N - 1); 99.99 % quantile with 11 degrees: 37.4
    chi_square = ((counts - expected) ** 2 / expected).sum().item() * (N - 1) / (N - k)
    assert chi_square < 37.4
    pairs = torch.bincount(indices[:, 0] * N + indices[:, -1], minlength=N * N).view(N, N)
    if k > 1:  # first and last slot are independent, except that they differ
        off = ~torch.eye(N, dtype=torch.bool)
        assert (pairs.diagonal() == 0).all()
        expected = tokens / (N * (N - 1))
        assert ((pairs[off] - expected) ** 2 / expected).sum().item() < 131 + 4 * (2 * 131) ** 0.5


def test_uniform_differs_between_passes_and_tokens_and_is_reproducible():
    router, x = build("uniform"), torch.zeros(T, D)
    torch.manual_seed(1)
    first, second = router(x).indices, router(x).indices
    torch.manual_seed(1)
    assert torch.equal(router(x).indices, first)
    assert not torch.equal(first, second)
    assert len({tuple(row) for row in first.tolist()}) > T // 2
    router.eval()
    assert not torch.equal(router(x).indices, router(x).indices), "THOR is random when evaluating, too"


# --- hash ------------------------------------------------------------------------------------------------------------


def test_hash_depends_on_the_token_id_alone():
    router = HashRouter(V, N, 3, seed=5)
    ids = torch.tensor([7, 250, 7, 7, 0])
    indices = router(torch.randn(5, D), ids).indices
    assert torch.equal(indices[0], indices[2]) and torch.equal(indices[0], indices[3])
    order = torch.tensor([4, 3, 2, 1, 0])
    assert torch.equal(router(torch.randn(5, D), ids[order]).indices, indices[order])
    everything = router(torch.randn(V, D), torch.arange(V)).indices
    assert len({tuple(row) for row in everything.tolist()}) > V // 2
    assert torch.equal(everything[ids], indices)


def test_hash_table_holds_every_expert_once_per_token_id():
    table = HashRouter(V, N, 3).table
    assert torch.equal(table.sort(-1).values, torch.arange(N, dtype=table.dtype).expand(V, N))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.filterwarnings("error")
def test_hash_takes_ids_of_any_integer_type(dtype):
    """Raw bytes are uint8, which indexing takes for a mask; with as many tokens as token ids the mask even fits."""
    router = HashRouter(8, N, 3, seed=5)
    ids = torch.tensor([1, 0, 3, 3, 7, 5, 1, 0])
    x = torch.randn(8, D)
    assert torch.equal(router(x, ids.to(dtype)).indices, router.table[ids, :3].long())


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (None, ["token_ids is missing"]),
        (torch.tensor([1, 2]), ["2 ids", "3 tokens"]),
        (torch.tensor([1, 2, V]), [str(V), str(V - 1)]),
        (torch.tensor([1.0, 2.0, 3.0]), ["token_ids", "float32"]),
        (torch.tensor([True, False, True]), ["token_ids", "bool"]),
        (torch.tensor([0, -1, 2]), ["token_ids", "from -1 to 2"]),
    ],
)
def test_bad_token_ids_are_named(ids, words):
    with pytest.raises(ValueError) as error:
        HashRouter(V, N, 3)(torch.randn(3, D), ids)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


# --- learned ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("k", [1, 3, N])
def test_balance_loss_equals_switch(k, score):
    """Eq. 4 of Fedus et al.: N * sum_i f_i * P_i, counted pair by pair."""
    router, x = LearnedRouter(D, N, k, score, init_std=1.0, seed=5), torch.randn(T, D)
    routing = router(x)
    f, p = [0.0] * N, [0.0] * N
    for t in range(T):
        exps = (router.weight.double() @ x[t].double()).exp()
        for i in range(N):
            p[i] += (exps[i] / exps.sum()).item() / T
        for i in exps.topk(k).indices.tolist():
            f[i] += 1 / (T * k)
    wanted = N * sum(a * b for a, b in zip(f, p, strict=True))
    assert routing.balance_loss.item() == pytest.approx(wanted, abs=1e-5)
    assert k == N or wanted > 1.01  # not a case where every formula gives 1


def test_balance_loss_is_one_when_balanced():
    router = LearnedRouter(N, N, 2)
    with torch.no_grad():
        router.weight.copy_(torch.eye(N) * 3)
    x = torch.eye(N) + torch.eye(N).roll(1, dims=1) / 2  # token i prefers expert i, then i + 1
    assert router(x).balance_loss.item() == pytest.approx(1.0, abs=1e-6)
    router.top_k = 1
    collapsed = router(torch.eye(N)[:1].expand(N, N) * 9).balance_loss.item()
    assert collapsed == pytest.approx(N, rel=0.01)


@pytest.mark.parametrize("score", SCORES)
def test_balance_loss_reaches_the_router_and_balances_it(score):
    router, x = LearnedRouter(D, N, 2, score, seed=5), torch.randn(500, D) + 1.0
    start = router(x).balance_loss.item()
    optimizer = torch.optim.Adam(router.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        router(x).balance_loss.backward()
        assert router.weight.grad.abs().sum() > 0 and router.bias.grad.abs().sum() > 0
        optimizer.step()
    assert router(x).balance_loss.item() < 1 + (start - 1) / 2


@pytest.mark.parametrize("score", SCORES)
def test_learned_router_is_always_in_the_graph(score):
    """DDP fails on a parameter without a gradient: with weights of 1 the gradient must be zero, not None."""
    layer = SMoE(D, 24, N, 3, router="learned", score=score)
    layer(torch.randn(T, D)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
    assert (layer.router.weight.grad == 0).all() == (score == "sum")


def test_gradient_reaches_x_through_a_fixed_router():
    router, x = RandomRouter(D, N, 3, init_std=1.0), torch.randn(T, D, requires_grad=True)
    router(x).weights.square().sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ROUTERS)
def test_bad_k_and_score_are_named(kind):
    for k in (0, N + 1, True, 2.0):
        with pytest.raises(ValueError, match=f"top_k is {k!r}; .* num_experts = {N}"):
            build(kind, k)
    with pytest.raises(ValueError, match="score is 'best'; .*softmax_after_topk"):
        build(kind, 1, "best")
    with pytest.raises(ValueError, match="router is 'clever'; .*random, learned, uniform, hash"):
        build("clever")


@pytest.mark.parametrize("kind", [RandomRouter, LearnedRouter])
def test_gradients_of_16_bit_tokens(kind):
    """Logits are float32 for any dtype of x; gradients equal those of a float32 router to the precision of x."""
    router, x = kind(32, 8, 3), torch.randn(50, 32).bfloat16().requires_grad_()
    exact = x.detach().float().requires_grad_()
    logits, want = router.logits(x), torch.nn.functional.linear(exact, router.weight, router.bias)
    assert logits.dtype == torch.float32 and torch.equal(logits, want)
    grad = torch.randn(50, 8)
    wanted = torch.autograd.grad(want, [exact, *router.parameters()], grad)
    for got, right in zip(torch.autograd.grad(logits, [x, *router.parameters()], grad), wanted, strict=True):
        assert (got.float() - right).norm() <= 1e-2 * right.norm()
