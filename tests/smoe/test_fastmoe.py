"""The layer with engine fastmoe against the layer with engine torch.

Where fmoe cannot run, the tests of a single process use a double of its interface (``fmoe_double``); those that need
fmoe itself are skipped.
"""

import copy
import importlib
import importlib.machinery
import pickle
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks

import smoe
from benchmarks.fastmoe_parity import KS, D, H, N, cases, compare, make_layer
from smoe import SMoE, record_routing
from smoe.compute import PATHS, choose
from smoe.fastmoe_available import fastmoe_obstacle, kernels_are_compiled
from smoe.parallel import ParallelGroups, clip_grad_norm_, fully_shard_model, parallelize
from smoe.router import PartialRouting

DOUBLE = Path(__file__).with_name("fmoe_double")
TOLERANCE = 1e-5
REASON = fastmoe_obstacle()
HAS_FMOE = REASON is None
needs_fmoe = pytest.mark.skipif(
    not HAS_FMOE, reason=f"{REASON}: install fastmoe (docs/fastmoe.md), or put fmoe and an fmoe_cuda on PYTHONPATH"
)


def forget(*names: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in names or name == "smoe.fastmoe"]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def fmoe(monkeypatch):
    """fmoe itself where it can run on a CPU, else its double."""
    if HAS_FMOE and not kernels_are_compiled():
        yield
        return
    forget("fmoe", "fmoe_cuda")
    monkeypatch.syspath_prepend(str(DOUBLE))
    yield
    forget("fmoe", "fmoe_cuda")


@pytest.fixture
def no_fmoe(monkeypatch, tmp_path):
    """Python finds no fmoe except what a test puts into the folder."""
    forget("fmoe", "fmoe_cuda")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("smoe.fastmoe_available.find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
    yield tmp_path
    forget("fmoe", "fmoe_cuda")


def name_of(options) -> str:
    return "-".join(str(value) for value in options.values())


@pytest.mark.parametrize("options", cases(), ids=name_of)
def test_equals_the_torch_engine_while_k_changes(fmoe, options):
    assert {1, 2, N // 2, N} <= set(KS)
    differences = compare(options)
    assert max(differences.values()) <= TOLERANCE, differences


def test_equals_it_in_double_precision(fmoe):
    differences = compare({"router": "learned", "score": "softmax_before_topk"}, dtype=torch.float64)
    assert max(differences.values()) <= 1e-12, differences


def engines(**options):
    fast, plain = (make_layer(engine, "cpu", **options) for engine in ("fastmoe", "torch"))
    plain.load_state_dict(fast.state_dict())
    return fast, plain


def test_fmoe_computes_the_experts(fmoe):
    import fmoe as package

    layer, plain = engines()
    assert isinstance(layer.fmoe, package.FMoE) and layer.engine == "fastmoe"
    assert list(layer.state_dict()) == list(plain.state_dict()) and plain.fmoe is None
    asked = []
    layer.fmoe.gate.register_forward_hook(lambda gate, args, output: asked.append(output[0].shape))
    layer.top_k = 3
    layer(torch.randn(2, 5, D))
    assert asked == [(10, 3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_half_precision(fmoe, dtype, way):
    fast, plain = engines(router="learned", top_k=3)
    if way == "weights":
        fast, plain = fast.to(dtype), plain.to(dtype)
    x = torch.randn(30, D).to(dtype if way == "weights" else torch.float32)
    outputs, gradients = [], []
    for layer in (fast, plain):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=way == "autocast"):
            y = layer(leaf)
        y.float().sum().backward()
        assert leaf.grad.dtype == x.dtype
        outputs.append(y)
        gradients.append([leaf.grad, *(p.grad for p in layer.parameters())])
        assert all(p.grad.dtype == p.dtype for p in layer.parameters())
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(*outputs, atol=tolerance, rtol=tolerance)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=4 * b.abs().max().item() * tolerance, rtol=tolerance)


@pytest.mark.parametrize("router", ["random", "learned", "uniform", "hash"])
def test_no_tokens(fmoe, router):
    layer, _ = engines(router=router, top_k=3)
    x = torch.randn(2, 0, D, requires_grad=True)
    with record_routing(layer) as routings:
        y = layer(x, token_ids=torch.zeros(2, 0, dtype=torch.int64))
    assert routings[0].indices.shape == (0, 3)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    assert all((p.grad == 0).all() for p in layer.experts.parameters())


def test_input_that_is_not_contiguous(fmoe):
    fast, plain = engines(top_k=N)
    x = torch.randn(D, 4, 6).permute(2, 1, 0)
    torch.testing.assert_close(fast(x), plain(x), atol=TOLERANCE, rtol=TOLERANCE)
    wide = torch.randn(5, 3 * D)
    torch.testing.assert_close(fast(wide[:, ::3]), plain(wide[:, ::3]), atol=TOLERANCE, rtol=TOLERANCE)


def test_experts_without_tokens_and_slots_without_experts(fmoe):
    fast, plain = engines(router="learned", top_k=2)
    x = torch.randn(6, D)
    indices = torch.tensor([[1, 2], [2, -1], [-1, -1], [1, 5], [-1, 5], [2, 1]])
    routing = PartialRouting(indices, torch.rand(6, 2), None)
    wanted = PATHS["grouped"](x, plain.experts, routing)
    torch.testing.assert_close(fast.fmoe(x, fast.experts, routing), wanted, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_layer_can_be_copied_pickled_and_run_without_gradients(fmoe):
    layer, _ = engines(router="learned", top_k=3)
    x = torch.randn(8, D)
    y = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), y)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(layer(x), y)


def test_a_compiled_model_runs_it_uncompiled(fmoe):
    compiling = []

    def activation(x):
        compiling.append(torch.compiler.is_compiling())
        return x.relu()

    layer, _ = engines(router="learned", top_k=3, activation=activation)
    x = torch.randn(8, D)
    assert torch.equal(torch.compile(layer, backend="eager")(x), layer(x))
    assert compiling == [False, False]


def test_slimmed_experts_and_dropout(fmoe):
    layer, plain = engines(router="random", top_k=3)
    x = torch.randn(20, D)
    votes = {"": torch.tensor([5, 1, 4, 0, 3, 2, 9, 8])}
    for each in (layer, plain):
        smoe.slim(each, votes, keep=4)
    torch.testing.assert_close(layer(x), plain(x), atol=TOLERANCE, rtol=TOLERANCE)
    dropping = SMoE(D, H, N, 2, engine="fastmoe", dropout=1.0, bias=False)
    assert (dropping(x) == 0).all() and (dropping.eval()(x) != 0).any()


def test_modulize_takes_the_engine(fmoe):
    encoder = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 3, 16)
    wanted = encoder(x)
    smoe.modulize(encoder, num_experts=4, score="sum", engine="fastmoe")
    (layer,) = (layer for _, layer in smoe.smoe_layers(encoder))
    assert layer.engine == "fastmoe"
    torch.testing.assert_close(encoder(x), wanted, atol=TOLERANCE, rtol=TOLERANCE)


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message and message.startswith("engine is 'fastmoe'") and "docs/fastmoe.md" in message
    return message


def test_without_fmoe_asking_for_it_is_one_clear_line(no_fmoe):
    with pytest.raises(ValueError) as error:
        SMoE(D, H, N, engine="fastmoe")
    assert "no package fmoe" in one_line(error)
    assert SMoE(D, H, N).engine == SMoE(D, H, N, engine="torch").engine == "torch"


def test_compiled_kernels_without_cuda_are_never_called(no_fmoe, monkeypatch):
    (no_fmoe / "fmoe").mkdir()
    (no_fmoe / "fmoe" / "__init__.py").write_text("raise SystemExit('imported')")
    with pytest.raises(ValueError) as error:
        SMoE(D, H, N, engine="fastmoe")
    assert "no package fmoe_cuda" in one_line(error)
    (no_fmoe / f"fmoe_cuda{importlib.machinery.EXTENSION_SUFFIXES[0]}").touch()
    importlib.invalidate_caches()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError) as error:
        SMoE(D, H, N, engine="fastmoe")
    assert "CUDA" in one_line(error)
    assert SMoE(D, H, N).engine == "torch"


def test_an_fmoe_that_does_not_import_is_named(no_fmoe, monkeypatch):
    (no_fmoe / "fmoe.py").write_text("import a_package_it_needs")
    (no_fmoe / "fmoe_cuda.py").touch()
    with pytest.raises(ValueError) as error:
        SMoE(D, H, N, engine="fastmoe")
    assert "a_package_it_needs" in one_line(error)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert SMoE(D, H, N).engine == "torch"


def test_a_path_cannot_be_chosen_with_fmoe(fmoe):
    with pytest.raises(ValueError, match="compute is 'grouped'.*'auto'"):
        SMoE(D, H, N, engine="fastmoe", compute="grouped")


def test_auto_finds_it_with_cuda_alone(fmoe, monkeypatch):
    assert SMoE(D, H, N).engine == "torch"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    layer = SMoE(D, H, N, 2)
    assert layer.engine == "auto" and layer.fmoe is not None
    assert SMoE(D, H, N, compute="grouped").engine == "torch"
    wanted = make_layer("torch", "cpu", top_k=2)
    layer.load_state_dict(wanted.state_dict())
    x = torch.randn(4, D)
    assert torch.equal(layer(x), wanted(x))  # on a CPU


def test_auto_takes_it_for_the_loop_over_experts_on_cuda_alone(fmoe):
    from smoe.fastmoe import FastMoE

    layer, mine = SMoE(128, 8 * 256, 8, 4), FastMoE(8, 128)

    def chosen(device: str, dtype: torch.dtype, k: int):
        x = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(8192, 128))  # the device need not exist
        layer.top_k = k
        return mine.replace(choose("auto", x, layer.experts, layer.router(torch.randn(3, 128))), x)

    assert chosen("cuda", torch.float32, 4) is mine
    assert chosen("cuda", torch.bfloat16, 4) is PATHS["grouped_mm"]
    assert chosen("cuda", torch.float32, 8) is PATHS["dense"]
    assert chosen("cpu", torch.float32, 4) is PATHS["grouped"]


def test_a_model_on_the_cpu_is_told_so(fmoe, monkeypatch):
    layer, _ = engines()
    monkeypatch.setattr("smoe.fastmoe.kernels_are_compiled", lambda: True)
    with pytest.raises(ValueError, match="x is on cpu.*CUDA"):
        layer(torch.randn(2, D))


@needs_fmoe
def test_fmoe_itself_was_tested():
    import fmoe as package

    assert DOUBLE not in Path(package.__file__).parents


def spread_equals_one_process(rank: int, expert_parallel: int, some: slice) -> dict[str, float]:
    groups = ParallelGroups.create(expert_parallel, timeout=60)
    results = [compare(options, groups) for options in cases()[some]]
    return {what: max(result[what] for result in results) for what in results[0]}


@needs_fmoe
@pytest.mark.distributed
@pytest.mark.parametrize(("world_size", "expert_parallel", "some"), [(2, 2, slice(None)), (4, 2, slice(3, 6))])
def test_spread_over_ranks_equals_one_process(world_size, expert_parallel, some):
    for differences in run_ranks(spread_equals_one_process, world_size, expert_parallel, some):
        assert max(differences.values()) <= TOLERANCE, differences


def losses_and_norms(rank: int) -> dict[str, list[float]]:
    """Four steps with FSDP, clipping and a growing k."""
    groups = ParallelGroups.create(2, timeout=60)
    result = {}
    for engine in ("torch", "fastmoe"):
        torch.manual_seed(0)
        layers = [SMoE(D, H, N, engine=engine, router="learned", seed=i) for i in range(2)]
        model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.LayerNorm(D), layer) for layer in layers))
        fully_shard_model(parallelize(model, groups), groups, blocks=list(model))
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        torch.manual_seed(rank)
        result[engine] = []
        for k in KS[:4]:
            smoe.set_top_k(model, k)
            x = torch.randn(10 + rank, D)
            loss = (model(x) - x).square().mean()
            loss.backward()
            result[engine] += [loss.item(), float(clip_grad_norm_(model, 0.1, groups))]
            optimizer.step(), optimizer.zero_grad()
    return result


@needs_fmoe
@pytest.mark.distributed
def test_training_with_fsdp_equals_the_torch_engine():
    for result in run_ranks(losses_and_norms, 4):
        assert result["fastmoe"] == pytest.approx(result["torch"], abs=TOLERANCE)


def test_spreading_needs_nccl_and_one_group(fmoe, monkeypatch):
    import fmoe_cuda

    layer, _ = engines()
    one, other = (ParallelGroups(0, 2, 2, 0, object(), 1, None) for _ in range(2))
    monkeypatch.delattr(fmoe_cuda, "global_scatter", raising=False)
    with pytest.raises(ValueError, match="expert_parallel.*NCCL"):
        parallelize(layer, one)
    monkeypatch.setattr(fmoe_cuda, "global_scatter", None, raising=False)
    from smoe.fastmoe import check_spread

    check_spread(one), check_spread(one)
    with pytest.raises(ValueError, match="one expert-parallel group per process"):
        parallelize(layer, other)
    assert layer.dispatch is None and layer.experts.up.shape[0] == N


@needs_fmoe
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda():
    for options in cases():
        differences = compare(options, device="cuda")
        # The device sums in another order.
        assert max(differences.values()) <= 1e-4, (options, differences)
