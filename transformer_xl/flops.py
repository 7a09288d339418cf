"""What a Transformer-XL costs: FLOPs of an evaluation pass and of a training step, and its parameters.

python -m transformer_xl.flops [--config RUN/config.yaml] [--method smoe_dropout] [--k 8 16] [--step] [--json]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from smoe.errors import Parser, run_main
from transformer_xl.cost import evaluation_flops, step_flops


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
