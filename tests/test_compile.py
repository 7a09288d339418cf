"""torch.compile takes both models whole, and what it makes of them computes the same at any k."""

import pytest
import torch

from bert.config import PretrainConfig
from bert.data import Vocabulary
from bert.model import MaskedLM, build_model
from smoe import set_top_k
from transformer_xl import TransformerXL
from transformer_xl.config import LanguageModelConfig

SIZES = {"num_layers": 2, "d_model": 32, "num_heads": 2, "d_hidden": 256, "num_experts": 8, "dropout": 0.0}
SIZES |= {"expert_dropout": 0.0}  # which would draw differently


def transformer_xl() -> tuple[TransformerXL, dict]:
    model = LanguageModelConfig("smoe_dropout", "unused", d_head=16, **SIZES).build_model()
    inputs = {"input_ids": torch.randint(256, (2, 12)), "targets": torch.randint(256, (2, 12))}
    return model, inputs | {"memory": torch.randn(2, 2, 12, 32), "memory_length": 12}


def masked_lm(name: str) -> tuple[MaskedLM, dict]:
    config = PretrainConfig("smoe_dropout", "unused", model=name, seq_len=16, attention_dropout=0.0, **SIZES)
    model = MaskedLM(build_model(config, Vocabulary(size=100, pad=1, unknown=3, start=0, end=2, mask=4)))
    inputs = {"input_ids": torch.randint(5, 100, (2, 16)), "positions": torch.rand(2, 16).argsort(1)[:, :3]}
    return model, inputs | {"targets": torch.randint(5, 100, (2, 3))}


def results(model: torch.nn.Module, forward: torch.nn.Module, inputs: dict) -> list[torch.Tensor]:
    model.zero_grad()
    loss = forward(**inputs).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize("build", [transformer_xl, lambda: masked_lm("bert"), lambda: masked_lm("roberta")])
def test_a_compiled_model_computes_the_same_at_any_k(build):
    """In one graph, forward and backward, and again after k has changed."""
    torch.compiler.reset()
    model, inputs = build()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for k in (3, 8):
        set_top_k(model, k)
        for got, want in zip(results(model, compiled, inputs), results(model, model, inputs), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
