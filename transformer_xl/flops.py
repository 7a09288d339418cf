"""What a Transformer-XL costs: FLOPs of an evaluation pass and of a training step, and its parameters.

python -m transformer_xl.flops [--config RUN/config.yaml] [--method smoe_dropout] [--k 8 16] [--step] [--json]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from smoe.errors import Parser, run_main
from smoe.flops import count_step
from transformer_xl.cost import evaluation_flops, meta_inputs


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    from smoe.cli import add_flops_options, add_run_options, given_lengths, print_flops, read_config
    from smoe.paper import check_k, sizes_of
    from transformer_xl.config import LanguageModelConfig

    parser = Parser(prog="python -m transformer_xl.flops", description="What a Transformer-XL costs, at every k.")
    add_flops_options(parser, "batch", "tgt_len", "mem_len")
    add_run_options(parser)
    options = parser.parse_args(argv)
    config, given = read_config(LanguageModelConfig, options), given_lengths(options)
    evaluation = {"batch": config.eval_batch_size, "tgt_len": config.eval_tgt_len, "mem_len": config.eval_mem_len}
    training = {"batch": config.batch_size, "tgt_len": config.tgt_len, "mem_len": config.mem_len}
    sizes_of("transformer_xl", given)  # each must be a whole number of at least 1, mem_len of at least 0
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
            inputs = meta_inputs(model, **training | given)
            rows[-1]["step"] = count_step(model, config.method, inputs, k, **weights)
    print_flops({**head, "rows": rows}, options.json)


if __name__ == "__main__":
    run_main(main)
