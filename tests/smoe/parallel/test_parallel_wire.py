"""The ranks send as many bytes as the formulas say, and far fewer than with one copy per expert."""

import copy

import pytest
import torch
from ranks import run_ranks

from smoe import SMoE, record_routing
from smoe.parallel import ParallelGroups, count_bytes, parallelize, wire_bytes
from smoe.parallel.wire import count_pairs

N, D, H, TOKENS = 16, 32, 128, 400


def measure(rank: int, expert_parallel: int) -> list[dict]:
    """Bytes of a forward and backward pass at every k: counted, by formula, and with one copy per expert."""
    groups = ParallelGroups.create(expert_parallel, timeout=60)
    found = []
    for k in range(1, N + 1):
        layer = parallelize(SMoE(D, H, N, k, seed=7), groups)
        torch.manual_seed(rank)
        x = torch.randn(TOKENS - 50 * rank, D, requires_grad=True)
        with count_bytes(layer) as counted, record_routing(layer) as routings:
            layer(x).sum().backward()
        pairs, copies = count_pairs(routings[0].indices, N, expert_parallel, groups.ep_rank)
        sent = {message.message: message for message in counted[""]}
        # every received row returns as a row of the output message
        exact = wire_bytes(
            len(x), D, k, N, expert_parallel, d_expert=H // N, rows=(pairs, sent["output"].rows), copies=(copies, 0)
        )
        found.append({
            "k": k,
            "measured": sum(message.bytes for message in counted[""]),
            "formula": exact.ours,
            "rows": (sent["forward"].rows, sent["gradient"].rows, pairs),
            "vectors": sum(sent[message].vectors for message in ("forward", "gradient")),
            "copies": 2 * copies * D * 4,
            "distinct / choices": pairs / copies,
        })  # fmt: skip
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_measured_bytes_are_the_formula(world_size):
    by_rank = run_ranks(measure, world_size, world_size)
    for results in by_rank:
        for result in results:
            assert result["measured"] == result["formula"], result
            assert result["rows"] == (result["rows"][2],) * 3
            # exactly one vector per distinct rank instead of one per choice
            assert result["vectors"] / result["copies"] == pytest.approx(result["distinct / choices"])
    at_all = [results[-1] for results in by_rank]
    # At k = N a token goes to every other rank once instead of N / W times.
    assert all(result["distinct / choices"] == world_size / N for result in at_all)


def totals(rank: int) -> list[tuple[int, int, float]]:
    """(bytes of all messages, bytes with one copy per expert, distinct ranks / k) at every k, counting this rank."""
    groups = ParallelGroups.create(4, timeout=60)
    found = []
    for k in range(1, N + 1):
        layer = parallelize(SMoE(256, 1024, N, k, seed=7), groups)
        x = torch.randn(TOKENS, 256, requires_grad=True)
        with count_bytes(layer) as counted, record_routing(layer) as routings:
            layer(x).sum().backward()
        ranks = torch.zeros(TOKENS, 4, dtype=torch.bool).scatter_(1, routings[0].indices // (N // 4), True)
        copies = 4 * TOKENS * k * 256 * 4  # out and back, forward and backward
        found.append((sum(m.bytes for m in counted[""]), copies, ranks.sum().item() / (TOKENS * k)))
    return found


@pytest.mark.distributed
def test_at_most_distinct_ranks_of_k_copies():
    """The bytes of routing and sizes are included."""
    for by_k in zip(*run_ranks(totals, 4), strict=True):
        measured, copies, share = (sum(column) for column in zip(*by_k, strict=True))
        assert measured <= copies * share / 4, by_k


def test_expected_bytes_of_a_random_choice():
    """The formula's expected bytes against choices that are drawn at random."""
    for k in (1, 2, 5, 8, 16):
        indices = torch.rand(20_000, N).argsort(1)[:, :k]
        for ranks in (2, 4, 8, 16):
            pairs, copies = count_pairs(indices, N, ranks, 1)
            drawn = wire_bytes(20_000, D, k, N, ranks, d_expert=8, rows=(pairs, pairs), copies=(copies, copies))
            expected = wire_bytes(20_000, D, k, N, ranks, d_expert=8)
            assert drawn.ours == pytest.approx(expected.ours, rel=0.02)
            assert drawn.fastmoe == pytest.approx(expected.fastmoe, rel=0.02)
            assert expected.ours < expected.fastmoe * 1.25 or k < 3


def test_formula_by_hand():
    """T = 10, d = 6, k = N = 4 on 2 ranks, float32: 10 rows go out, 10 vectors come back, and again."""
    result = wire_bytes(10, 6, 4, 4, 2, d_expert=3)
    # A row has 24 bytes of x, 2 weights of 4 and 2 experts of 2, padded to 40; with the weights' gradients 32 go back.
    assert result.ours == 24 + 10 * (40 + 24) + 10 * (24 + 32)
    assert result.fastmoe == 8 * 2 + 4 * 10 * 2 * 24
    assert result.data_parallel == 4 * (4 * 2 * 3 * 6 + 4 * (3 + 6))


def count_outside_the_block(rank: int) -> None:
    groups = ParallelGroups.create(2, timeout=60)
    layer = parallelize(SMoE(D, H, N, 2), groups)
    with count_bytes(layer) as counted:
        pass
    copy.deepcopy(layer)(torch.randn(3, D))
    layer(torch.randn(3, D))
    assert counted == {"": []}


@pytest.mark.distributed
def test_nothing_is_counted_outside_the_block():
    run_ranks(count_outside_the_block, 2)
