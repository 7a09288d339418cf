"""A fixed router is the same float32 numbers however the model was built, cast, moved and loaded."""

import copy

import pytest
import torch
from torch import nn

import smoe

D, N, K = 64, 16, 4


def expected(seed=0):
    """The draw, written out."""
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float32) * 0.02


def router(seed=0):
    return smoe.RandomRouter(D, N, K, seed=seed)


def assert_whole(fixed, weight=None):
    weight = expected() if weight is None else weight
    assert fixed.weight.dtype == fixed.bias.dtype == torch.float32 and fixed.weight.device.type == "cpu"
    assert torch.equal(fixed.weight, weight) and torch.equal(fixed.bias, torch.zeros(N))
    assert not list(fixed.parameters()) and set(fixed.state_dict()) == {"weight", "bias"}


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float64], ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    yield dtype
    torch.set_default_dtype(torch.float32)


def test_under_another_default_dtype(default_dtype):
    assert_whole(router())
    hashed, uniform = smoe.HashRouter(50, N, K, seed=1), smoe.UniformRouter(N, K)
    x = torch.randn(9, D)
    torch.manual_seed(3)
    drawn = uniform(x)
    weights = hashed(x, torch.arange(9)).weights
    torch.set_default_dtype(torch.float32)
    assert torch.equal(hashed.table, smoe.HashRouter(50, N, K, seed=1).table)
    torch.manual_seed(3)
    assert torch.equal(drawn.indices, uniform(x).indices)
    assert drawn.weights.dtype == weights.dtype == router()(x).weights.dtype == torch.float32


def test_under_casts(dtype):
    assert_whole(router().to(dtype))
    assert_whole(nn.ModuleList([router()]).type(dtype)[0])
    assert_whole(copy.deepcopy(router().half()).float().bfloat16().double())


def test_through_the_meta_device(dtype):
    with torch.device("meta"):
        fixed = router()
    assert fixed.weight.is_meta
    assert_whole(copy.deepcopy(fixed).to_empty(device="cpu"))
    assert_whole(copy.deepcopy(fixed).to(dtype).to_empty(device="cpu"))
    assert_whole(router().to("meta").to(dtype).to_empty(device="cpu"))
    assert_whole(router().to_empty(device="cpu"))  # new memory, which has no numbers of its own


def test_without_a_seed_through_the_meta_device():
    torch.manual_seed(5)
    drawn = smoe.RandomRouter(D, N, K).weight
    torch.manual_seed(5)
    with torch.device("meta"):
        fixed = smoe.RandomRouter(D, N, K)
    assert_whole(fixed.to_empty(device="cpu"), drawn)


def test_what_was_loaded_goes_through_the_meta_device():
    fixed, other = router(), torch.randn(N, D)
    fixed.load_state_dict({"weight": other, "bias": torch.zeros(N)})
    assert_whole(fixed.to("meta").to_empty(device="cpu"), other)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("meta", [False, True])
def test_from_a_checkpoint_that_was_cast(dtype, assign, meta):
    cast = {name: value.to(dtype) for name, value in router().state_dict().items()}
    with torch.device("meta" if meta else "cpu"):
        fixed = router()
    if meta and not assign:
        fixed.to_empty(device="cpu")
    fixed.load_state_dict(cast, assign=assign)
    assert_whole(fixed)
    assert cast["weight"].dtype == dtype  # the checkpoint is not ours to change


@pytest.mark.parametrize("assign", [False, True])
def test_from_a_cast_checkpoint_of_another_router(dtype, assign):
    cast = {name: value.to(dtype) for name, value in router(seed=1).state_dict().items()}
    fixed = router()
    fixed.load_state_dict(cast, assign=assign)
    assert_whole(fixed, cast["weight"].float())


def test_in_a_layer_that_is_cast_and_assigned():
    layer = smoe.SMoE(D, 32, N, top_k=K, seed=0)
    layer.load_state_dict({k: v.bfloat16() for k, v in layer.state_dict().items()}, assign=True)
    assert_whole(layer.router)
    assert layer.experts.up.dtype == torch.bfloat16 and layer(torch.randn(3, D).bfloat16()).dtype == torch.bfloat16


def test_a_wrong_shape_is_still_refused():
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        router().load_state_dict({"weight": torch.zeros(N, 3).half(), "bias": torch.zeros(N)})


def test_shared_memory_stays_shared():
    fixed = router()
    pointer = fixed.weight.data_ptr()
    assert fixed.to("cpu").weight.data_ptr() == pointer
    assert fixed.share_memory().weight.is_shared()
    assert_whole(fixed)


def table(seed=0):
    """The draw of a hash router, written out."""
    draw = torch.rand(50, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return draw.argsort(-1).to(torch.int32)


@pytest.mark.parametrize("assign", [False, True])
def test_the_table_of_a_hash_router(dtype, assign):
    def assert_same(hashed):
        assert hashed.table.dtype == torch.int32 and torch.equal(hashed.table, table())

    assert_same(smoe.HashRouter(50, N, K, seed=0).to(dtype))
    with torch.device("meta"):
        hashed = smoe.HashRouter(50, N, K, seed=0)
    assert hashed.table.is_meta
    assert_same(copy.deepcopy(hashed).to_empty(device="cpu"))
    assert_same(smoe.HashRouter(50, N, K, seed=0).to("meta").to_empty(device="cpu"))
    other = smoe.HashRouter(50, N, K, seed=1)
    other.load_state_dict({"table": table().to(dtype)}, assign=assign)  # up to 256 experts, no dtype rounds them
    assert_same(other)
    assert other(torch.randn(3, D), torch.tensor([0, 7, 49])).indices.tolist() == table()[[0, 7, 49], :K].tolist()
