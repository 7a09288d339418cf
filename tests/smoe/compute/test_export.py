"""Exporters get a graph of PyTorch's own operators, which holds for other inputs."""

import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

import smoe


def make(num_experts=4, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)).eval()
    return smoe.modulize(model, num_experts, **{"top_k": 2, "seed": 0, **options})


def operators(program):
    graphs = [module.graph for module in program.graph_module.modules() if hasattr(module, "graph")]
    return {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"compute": "grouped"}, {"compute": "dense"}, {"top_k": 4}, {"router": "learned"}, {"score": "sum"}],
    ids=str,
)
def test_an_exported_program_has_no_operator_of_ours(options, strict):
    model, tokens = make(**options), torch.export.Dim("tokens", min=2, max=100)
    program = torch.export.export(model, (torch.randn(5, 8),), dynamic_shapes=({0: tokens},), strict=strict)
    assert not [name for name in operators(program) if "smoe" in name]
    x = torch.randn(9, 8)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_onnx(dynamo, tmp_path):
    model, x = make(), torch.randn(5, 8)
    file = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (x,), file, dynamo=dynamo, verbose=False)
    run = ReferenceEvaluator(file)
    (y,) = run.run(None, {run.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x).detach())
