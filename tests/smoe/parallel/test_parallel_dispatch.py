"""An expert-parallel layer has the outputs and gradients of the whole layer in a single process."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from smoe import SMoE, record_routing
from smoe.compute import PATHS, reference
from smoe.parallel import ParallelGroups, parallelize, sync_expert_gradients
from smoe.parallel.plan import make_plan

N, D, H = 8, 16, 64
UNEVEN = [7, 0, 1, 12]  # tokens per rank


def cases():
    """Every router, score and path; biases, gates, output scales, numbers of tokens; k from 1 to N."""
    base = {"router": "random", "score": "softmax_after_topk", "bias": True, "gated": False, "compute": "auto", "k": 3}
    base |= {"output_scale": 1, "tokens": UNEVEN}
    yield from ({**base, "k": k} for k in range(1, N + 1))
    routers = ("random", "learned", "uniform", "hash")
    scores = ("softmax_after_topk", "softmax_before_topk", "sum")
    for router, score in itertools.product(routers, scores):
        yield {**base, "router": router, "score": score, "k": 2}
    for path, bias, gated in itertools.product(PATHS, (True, False), (True, False)):
        yield {**base, "compute": path, "bias": bias, "gated": gated, "k": 5}
    yield from ({**base, "output_scale": scale} for scale in ("k", "num_experts", 3.0))
    yield from ({**base, "tokens": tokens} for tokens in ([0, 0, 0, 0], [0, 3, 0, 0], [1, 1, 1, 1], [5, 5, 5, 5]))


def make(case: dict) -> SMoE:
    torch.manual_seed(3)
    options = {name: case[name] for name in ("router", "score", "bias", "gated", "compute", "output_scale")}
    return SMoE(D, H, N, case["k"], activation="gelu", seed=5, vocab_size=20, **options)


def reference_run(whole: SMoE, x, routing, grad_y):
    """Outputs and gradients of the whole layer with the reference path, for a routing that is given."""
    x = x.clone().requires_grad_()
    if routing.weights.requires_grad:  # the same experts; the weights computed from this x
        logits = whole.router.logits(x)
        routing = routing._replace(weights=whole.router._weights(logits, routing.indices))
    routing = routing._replace(weights=routing.weights * whole.scale)
    y = reference.compute(x, whole.experts, routing)
    y.backward(grad_y)
    return y.detach(), x.grad


def layer_equals_whole(rank: int, expert_parallel: int) -> None:
    groups = ParallelGroups.create(expert_parallel, timeout=60)
    for case in cases():
        whole = make(case)
        layer = parallelize(copy.deepcopy(whole), groups)
        assert layer.num_experts == N and layer.experts.up.shape[0] == N // expert_parallel
        torch.manual_seed(10 + rank)
        tokens = case["tokens"][rank]
        x, grad_y = torch.randn(tokens, D), torch.randn(tokens, D)
        ids = torch.randint(0, 20, (tokens,))
        leaf = x.clone().requires_grad_()
        with record_routing(layer) as routings:
            y = layer(leaf, token_ids=ids)
        y.backward(grad_y)
        sync_expert_gradients(layer, groups)
        want_y, want_x = reference_run(whole, x, routings[0], grad_y)
        close(case, "y", y, want_y)
        close(case, "x", leaf.grad, want_x)
        with torch.no_grad():
            if case["router"] != "uniform":
                close(case, "no_grad", layer(x, token_ids=ids), want_y)
        for name, parameter in whole.named_parameters():
            if not name.startswith("experts."):
                got = layer.get_parameter(name).grad
                close(case, name, got, parameter.grad)
                continue
            dist.all_reduce(parameter.grad.div_(dist.get_world_size()))
            close(case, name, layer.get_parameter(name).grad, groups.scatter_experts(parameter.grad))


def close(case: dict, what: str, got, want) -> None:
    if got is None or want is None:  # with score sum a router may have no gradient in one of the two
        assert (got is None or not got.any()) and (want is None or not want.any())
        return
    assert (got - want).abs().max().item() <= 2e-6 if got.numel() else got.shape == want.shape, f"{what} of {case}"


@pytest.mark.distributed
@pytest.mark.parametrize("world_size, expert_parallel", [(2, 2), (4, 4), (4, 2)])
def test_layer_equals_the_whole_one(world_size, expert_parallel):
    run_ranks(layer_equals_whole, world_size, expert_parallel)


def bf16_equals_whole(rank: int) -> None:
    groups = ParallelGroups.create(2, timeout=60)
    for path, k in itertools.product(PATHS, (1, 3, 8)):
        torch.manual_seed(3)
        whole = SMoE(D, H, N, k, seed=5, compute=path)
        layer = parallelize(copy.deepcopy(whole), groups)
        torch.manual_seed(10 + rank)
        x, grad_y = torch.randn(UNEVEN[rank], D), torch.randn(UNEVEN[rank], D)
        found = []
        for module in (layer, whole):
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                y = module(leaf)
            (y.float() * grad_y).sum().backward()
            found.append((y.detach().float(), leaf.grad))
        sync_expert_gradients(layer, groups)
        for parameter in whole.experts.parameters():
            dist.all_reduce(parameter.grad.div_(2))
        pairs = [
            *zip(*found, strict=True),
            *((layer.experts.get_parameter(name).grad, groups.scatter_experts(p.grad)) for name, p in
              whole.experts.named_parameters()),
        ]  # fmt: skip
        for got, want in pairs:
            assert (got - want).norm() <= 0.02 * want.norm(), f"{path}, k = {k}"


@pytest.mark.distributed
def test_autocast_to_bfloat16():
    run_ranks(bf16_equals_whole, 2)


def test_plan_sends_each_token_once_to_each_rank():
    indices = torch.tensor([[0, 5, 1], [4, -1, 5], [2, 3, 7]])
    plan = make_plan(indices, num_local=2, num_ranks=4, rank=2)
    # this rank (experts 4, 5) first, then ranks 0, 1, 3
    assert plan.tokens.tolist() == [0, 1, 0, 2, 2]
    assert plan.columns.tolist() == [[1, -1], [0, 2], [0, 2], [0, 1], [2, -1]]
    assert plan.rows.tolist() == [1, 1, 2, 1]
    bags = plan.bags.tolist()
    starts = [*plan.starts.tolist(), len(bags)]
    assert [bags[a:b] for a, b in itertools.pairwise(starts)] == [[0, 2], [1], [3, 4]]
