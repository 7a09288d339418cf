"""torch.export, ONNX, Hugging Face's exporters, AOTInductor: graphs for every batch and length, equal to the model."""

from __future__ import annotations

import shutil
import warnings

import pytest
import setuptools  # noqa: F401 (its distutils, which the compiler of graphs needs, has to come before Python's own)
import torch
from tiny_models import BASE, LLAMA, build
from torch import nn

import smoe

BATCHES, LENGTHS = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("length", min=2, max=30)
AXES = {0: BATCHES, 1: LENGTHS}
SHAPES = [(1, 2), (3, 5), (2, 17)]  # none is the example's, which is 2 x 7
# name -> (class, config, experts that slimming keeps of 3)
MODELS = {
    "bert": ("BertModel", BASE, None),
    "slimmed llama": ("LlamaForCausalLM", LLAMA, 2),
}
CASES = [("bert", 1), ("bert", 2), ("bert", 3), ("slimmed llama", 1)]  # the third is k = N


def make(name: str, k: int) -> nn.Module:
    """One layer of 3 experts, its weights large enough that every expert shows."""
    torch.manual_seed(0)
    model_class, sizes, keep = MODELS[name]
    sizes = {**sizes, "num_hidden_layers": 1, "intermediate_size": 48, "initializer_range": 0.3, "use_cache": False}
    model = smoe.modulize(build(model_class, sizes), 3, seed=0, top_k=k, output_scale="num_experts")
    if keep is not None:
        smoe.slim(model, smoe.vote(model, [batch(4, 8)]), keep=keep)
    return model


def batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Tokens, of which the first row has one only."""
    ids, mask = torch.randint(3, 40, (rows, length)), torch.ones(rows, length, dtype=torch.int64)
    mask[0, 1:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def export(model: nn.Module) -> torch.export.ExportedProgram:
    example = batch(2, 7)
    with torch.no_grad():
        return torch.export.export(model, (), example, dynamic_shapes=dict.fromkeys(example, AXES))


def assert_equal(model: nn.Module, run) -> None:
    """``run(batch)`` gives what the model gives, at every shape, and at no other k."""
    k = smoe.get_top_k(model)
    for shape in SHAPES:
        inputs = batch(*shape)
        with torch.no_grad():
            want = model(**inputs)[0]
            torch.testing.assert_close(run(inputs), want, atol=1e-4, rtol=0)
            with smoe.activated(model, 1 if k > 1 else 2):
                assert (model(**inputs)[0] - want).abs().max() > 1e-2


def onnxruntime_of(file):
    """What runs an ONNX file on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(session.run(None, {name: t.numpy() for name, t in inputs.items()})[0])


@pytest.fixture(scope="session")
def exported() -> dict[tuple[str, int], torch.export.ExportedProgram]:
    return {}


@pytest.fixture(params=CASES, ids=str)
def case(request, exported):
    """(model, program); a program is made once."""
    model = make(*request.param)
    if request.param not in exported:
        exported[request.param] = export(model)
    return model, exported[request.param]


def test_torch_export(case):
    model, program = case
    module = program.module()
    assert_equal(model, lambda inputs: module(**inputs)[0])
    nonzero = sum("nonzero" in str(node.target) for node in program.graph.nodes)
    num_experts = smoe.smoe_layers(model)[0][1].num_experts
    # At k = N one MLP, else one expert after the other.
    assert nonzero == (0 if smoe.get_top_k(model) == num_experts else num_experts)


@pytest.mark.parametrize("case", CASES[:3], ids=str, indirect=True)
def test_onnx(case, tmp_path):
    model, program = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    assert_equal(model, onnxruntime_of(tmp_path / "model.onnx"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["Dynamo", "Onnx"])
def test_hugging_faces_exporters(kind, tmp_path):
    from transformers import exporters

    model = make("slimmed llama", 1)
    config = getattr(exporters, f"{kind}Config")(dynamic=True, dynamic_shapes=dict.fromkeys(batch(1, 2), AXES))
    done = getattr(exporters, f"{kind}Exporter")().export(model, batch(2, 7), config=config)
    if kind == "Dynamo":
        module = done.program.module()
        assert_equal(model, lambda inputs: module(**inputs)[0])
    else:
        done.save_pretrained(tmp_path)
        assert_equal(model, onnxruntime_of(tmp_path / "model.onnx"))


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
def test_compiled_ahead_of_time(tmp_path):
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16)).eval()
    model = smoe.modulize(mlp, 3, seed=0, top_k=2, score="sum")
    x = torch.randn(5, 16)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2, max=64)},))
        # What compiles faster.
        options = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
        file = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2"), inductor_configs=options
        )
        compiled = torch._inductor.aoti_load_package(file)
        for tokens in (2, 9, 33):
            x = torch.randn(tokens, 16)
            torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=0)
