"""What a Transformer-XL costs: FLOPs of an evaluation pass and of a training step, and its parameters.

python -m transformer_xl.flops [--config RUN/config.yaml] [--method smoe_dropout] [--k 8 16] [--step] [--json]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from smoe.errors import Parser, run_main
from smoe.flops import TopK, count, count_step
from smoe.methods import Method
from transformer_xl.model import TransformerXL


def evaluation_flops(model: TransformerXL, k: TopK, *, batch: int, tgt_len: int, mem_len: int) -> dict[str, int]:
    """The cost of one evaluation pass: ``paper`` and ``true`` FLOPs and the sizes of ``smoe.flops.FlopCount``.

    Args:
        model: on any device; on ``meta`` it need not even be allocated.
        k: activated experts: one number, one per SMoE layer, or None for each layer's own.
        batch, tgt_len, mem_len: sequences, tokens of each and remembered tokens.

    Raises:
        ValueError: k or a length does not fit.
    """
    counted = dataclasses.asdict(count(model, _inputs(model, batch, tgt_len, mem_len), k))
    # Table 1 counts the released model, which projects queries of remembered tokens too, and encodes one position less.
    more_rows = batch * mem_len - 1
    c = model.config
    paper = counted.pop("paper_linear") + c.num_layers * 2 * more_rows * c.d_model * c.num_heads * c.d_head
    return {"paper": paper, **counted}


def step_flops(
    model: TransformerXL,
    method: str | Method,
    k: TopK,
    *,
    batch: int,
    tgt_len: int,
    mem_len: int,
    consistency_weight: float | None = None,
    balance_weight: float | None = None,
) -> int:
    """True FLOPs of a training step, forward and backward (``smoe.flops.count_step``).

    Args:
        method: whose loss is minimised.
        consistency_weight, balance_weight: replace the method's own; without consistency loss there is one forward
            pass.
        model, k, batch, tgt_len, mem_len: as in :func:`evaluation_flops`.
    """
    inputs = _inputs(model, batch, tgt_len, mem_len)
    weights = {"consistency_weight": consistency_weight, "balance_weight": balance_weight}
    return count_step(model, method, inputs, k, **weights)


def _inputs(model: TransformerXL, batch: int, tgt_len: int, mem_len: int) -> dict[str, Any]:
    for name, value, least in (("batch", batch, 1), ("tgt_len", tgt_len, 1), ("mem_len", mem_len, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    ids = torch.empty(batch, tgt_len, dtype=torch.int64, device="meta")
    shape = (len(model.layers), batch, mem_len, model.config.d_model)
    memory = torch.empty(shape, dtype=next(model.parameters()).dtype, device="meta") if mem_len else None
    return {"input_ids": ids, "targets": ids, "memory": memory}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    from smoe.cli import add_flops_options, add_run_options, given_lengths, print_flops, read_config
    from smoe.paper import check_k
    from transformer_xl.config import LanguageModelConfig

    parser = Parser(prog="python -m transformer_xl.flops", description="What a Transformer-XL costs, at every k.")
    add_flops_options(parser, "batch", "tgt_len", "mem_len")
    add_run_options(parser)
    options = parser.parse_args(argv)
    config, given = read_config(LanguageModelConfig, options), given_lengths(options)
    evaluation = {"batch": config.eval_batch_size, "tgt_len": config.eval_tgt_len, "mem_len": config.eval_mem_len}
    training = {"batch": config.batch_size, "tgt_len": config.tgt_len, "mem_len": config.mem_len}
    weights = {name: getattr(config, name) for name in ("consistency_weight", "balance_weight")}
    head = {"arch": "transformer_xl", "config": options.config, "method": config.method, **evaluation, **given}
    if options.step:
        head |= {f"step_{name}": value for name, value in (training | given).items()}
    with torch.device("meta"):
        model = config.build_model()
    rows = []
    for k in options.k or config.sweep_ks():
        check_k(config.method, k, config.num_experts)
        rows.append({"k": k, **evaluation_flops(model, k, **evaluation | given)})
        if options.step:
            rows[-1]["step"] = step_flops(model, config.method, k, **training | given, **weights)
    print_flops({**head, "rows": rows}, options.json)


if __name__ == "__main__":
    run_main(main)
