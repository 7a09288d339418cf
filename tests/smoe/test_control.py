"""k and recorded routing of a whole model."""

import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from smoe import SMoE, activated, get_top_k, record_routing, set_top_k, smoe_layers
from smoe.router import ROUTERS, SCORES

D = 8


def layer(num_experts=4, top_k=2, **options):
    return SMoE(D, 16, num_experts, top_k, **options)


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def test_layers_are_found_in_order_and_once():
    shared = layer()
    model = nn.Sequential(layer(), nn.Sequential(nn.Linear(D, D), shared), shared)
    assert [name for name, _ in smoe_layers(model)] == ["0", "1.1"]
    assert [name for name, _ in smoe_layers(layer())] == [""]


def test_set_and_get():
    model = Wrapper(nn.Sequential(layer(), nn.ReLU(), layer(8, 3)))
    assert get_top_k(model) == [2, 3]
    set_top_k(model, 4)
    assert get_top_k(model) == 4
    assert [module.top_k for _, module in smoe_layers(model)] == [4, 4]


@pytest.mark.parametrize("k", [0, -1, 5, True, 1.0, "2", None])
def test_every_layer_takes_k_or_none_does(k):
    model = nn.Sequential(layer(8, 3), layer(4, 2))  # 5 fits the first layer only
    with pytest.raises(ValueError, match="top_k is .* num_experts = [48]"):
        set_top_k(model, k)
    assert get_top_k(model) == [3, 2]


def test_a_model_without_layers_is_an_error():
    for act in (lambda: set_top_k(nn.Linear(2, 2), 1), lambda: get_top_k(nn.Linear(2, 2))):
        with pytest.raises(ValueError, match="Linear has no SMoE layer"):
            act()
    with record_routing(nn.Linear(2, 2)) as routings:
        pass
    assert routings == []


def test_one_routing_per_layer_and_pass():
    model = Wrapper(Wrapper(nn.Sequential(layer(top_k=1), layer(8, 3))))
    x = torch.randn(2, 5, D)
    model(x)
    with record_routing(model) as routings:
        assert routings == []
        model(x)
        model(x[:1])
    model(x)
    assert [routing.indices.shape for routing in routings] == [(10, 1), (10, 3), (5, 1), (5, 3)]
    assert torch.equal(routings[0].indices, smoe_layers(model)[0][1].router(x.reshape(-1, D)).indices)


def test_shared_layers_and_shared_routers_count_by_pass():
    shared = layer()
    with record_routing(nn.Sequential(shared, shared)) as routings:
        nn.Sequential(shared, shared)(torch.randn(3, D))
    assert len(routings) == 2
    one, two = layer(), layer()
    two.router = one.router
    model = nn.Sequential(one, two)
    with record_routing(model) as routings:
        model(torch.randn(3, D))
    assert len(routings) == 2


def test_blocks_may_be_nested():
    model, x = nn.Sequential(layer(), layer()), torch.randn(3, D)
    with record_routing(model) as outer:
        model(x)
        with record_routing(model) as inner, record_routing(model[1]) as part:
            model(x)
        model(x)
    assert (len(outer), len(inner), len(part)) == (6, 2, 1)


def test_nothing_is_left_after_an_exception():
    model = nn.Sequential(layer(), layer())
    with pytest.raises(RuntimeError, match="stop"), record_routing(model) as routings:
        model(torch.randn(3, D))
        raise RuntimeError("stop")
    model(torch.randn(3, D))
    assert len(routings) == 2


def test_recording_changes_neither_output_nor_state():
    model, x = layer(router="learned"), torch.randn(3, D)
    keys, y = list(model.state_dict()), model(x)
    with record_routing(model):
        assert torch.equal(model(x), y) and list(model.state_dict()) == keys


def test_balance_loss_has_a_graph_under_activation_checkpointing():
    model, x = layer(router="learned"), torch.randn(6, D, requires_grad=True)
    with record_routing(model) as routings:
        y = checkpoint(model, x, use_reentrant=False)
    assert len(routings) == 1
    (y.sum() + routings[0].balance_loss).backward()
    got = model.router.weight.grad.clone()
    model.zero_grad()
    assert len(routings) == 1
    with record_routing(model) as routings:
        y = model(x)
    (y.sum() + routings[0].balance_loss).backward()
    torch.testing.assert_close(got, model.router.weight.grad)


@pytest.mark.slow
def test_recording_sees_a_model_that_was_compiled_before():
    """A forward hook that is added after torch.compile is never called: the list would silently stay empty."""
    model = layer(2, 1, router="learned")
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(5, D)
    y = compiled(x)
    torch.testing.assert_close(y, model(x))
    for step in range(3):
        with record_routing(compiled) as routings:
            compiled(x)
        assert len(routings) == 1, step
        routings[0].balance_loss.backward()
        assert model.router.weight.grad is not None
    compiled(x)
    assert len(routings) == 1
    set_top_k(compiled, 2)
    torch.testing.assert_close(compiled(x), model(x))


def test_a_router_can_be_pickled():
    router = layer().router
    x = torch.randn(3, D)
    assert torch.equal(pickle.loads(pickle.dumps(router))(x).indices, router(x).indices)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_under_ddp_no_parameter_goes_unused(one_process):
    """DDP fails in the second step if a parameter got no gradient in the first, such as one of an idle expert."""
    for router in ROUTERS:
        for score in SCORES:
            for compute in ("auto", "reference"):
                model = layer(8, 1, router=router, score=score, compute=compute, vocab_size=3)
                wrapped = DistributedDataParallel(model)
                for _ in range(2):
                    with record_routing(wrapped) as routings:
                        wrapped(torch.randn(2, D), token_ids=torch.zeros(2, dtype=torch.int64)).sum().backward()
                    assert len(routings) == 1
                set_top_k(wrapped, 2)
                assert model.top_k == get_top_k(wrapped) == 2


def test_one_k_per_layer_is_set_as_a_whole_or_not_at_all():
    model = nn.Sequential(SMoE(8, 32, 4), SMoE(8, 32, 8))
    set_top_k(model, [3, 5])
    assert get_top_k(model) == [3, 5]
    for wrong, words in (([1], "1 numbers.*2 SMoE layers"), ([2, 9], "top_k is 9"), ([5, 5], "top_k is 5")):
        with pytest.raises(ValueError, match=words):
            set_top_k(model, wrong)
        assert get_top_k(model) == [3, 5]


def test_activated_is_for_the_block_alone():
    model = nn.Sequential(SMoE(8, 32, 4), SMoE(8, 32, 8))
    set_top_k(model, [3, 5])
    with activated(model, 2):
        assert get_top_k(model) == 2
        with activated(model, None):
            assert get_top_k(model) == 2
    with pytest.raises(RuntimeError, match="stop"), activated(model, [1, 7]):
        raise RuntimeError("stop")
    assert get_top_k(model) == [3, 5]
