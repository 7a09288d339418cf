"""What a BERT or RoBERTa costs: FLOPs of a pass over whole sequences and of a training step, and its parameters.

python -m bert.flops --model bert [--config RUN/config.yaml] [--method smoe_dropout] [--k 8 16] [--step] [--json]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from smoe.errors import Parser, run_main
from smoe.flops import count, count_step
from smoe.methods import get_method
from smoe.paper import check_k, sizes_of

MODELS = ("bert", "roberta")


def masked_lm(
    model: str, method: str = "dense_dropout", k: int | None = None, *, num_experts: int = 16, **sizes: int
) -> nn.Module:
    """Hugging Face's BERT or RoBERTa for masked-LM on the meta device, each layer's MLP that of ``method``.

    Args:
        model: ``bert`` or ``roberta``.
        k: activated experts; None means all of them.
        sizes: replace those of ``smoe.paper.SIZES[model]``.

    Raises:
        ValueError: an unknown model, method or size, or a k that does not fit.
    """
    if model not in MODELS:
        raise ValueError(f"model is {model!r}; it must be one of {', '.join(MODELS)}")
    s = sizes_of(model, sizes)
    check_k(method, k, num_experts)
    import transformers

    name = {"bert": "Bert", "roberta": "Roberta"}[model]
    model_class = getattr(transformers, f"{name}ForMaskedLM")
    extra = {"max_position_embeddings": 514, "type_vocab_size": 1} if model == "roberta" else {}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=s["vocab_size"],
        hidden_size=s["d_model"],
        num_hidden_layers=s["num_layers"],
        num_attention_heads=s["num_heads"],
        intermediate_size=s["d_hidden"],
        **extra,
    )
    options: dict[str, Any] = {"activation": "gelu"}
    if get_method(method).routed:
        options["top_k"] = num_experts if k is None else k
    with torch.device("meta"):
        built = model_class(config)
        for layer in built.base_model.encoder.layer:
            layer.intermediate = get_method(method).make_mlp(
                s["d_model"], s["d_hidden"], num_experts=num_experts, **options
            )
            layer.output.dense = nn.Identity()
    return built


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    from bert.config import PretrainConfig
    from smoe.cli import add_flops_options, add_run_options, flops_row, given_lengths, need, print_flops, read_config

    parser = Parser(
        prog="python -m bert.flops",
        description="What a BERT or RoBERTa costs, at every k. The head counts for every token, as in Table 1.",
    )
    parser.add_argument("--model", choices=MODELS, help="needed where --config does not say it")
    parser.add_argument("--vocab_size", type=int, help="number of token ids (default: the paper's)")
    add_flops_options(parser, "batch", "seq_len")
    add_run_options(parser)
    options = parser.parse_args(argv)
    need("transformers", "hf")
    config, given = read_config(PretrainConfig, options), given_lengths(options)
    evaluation = {"batch": config.eval_batch_size, "seq_len": config.seq_len} | given
    training = {"batch": config.batch_size, "seq_len": config.seq_len} | given
    weights = {name: getattr(config, name) for name in ("consistency_weight", "balance_weight")}
    head = {"arch": config.model, "config": options.config, "method": config.method, **evaluation}
    if options.step:
        head |= {f"step_{name}": value for name, value in training.items()}
    sizes = {name: getattr(config, name) for name in ("num_layers", "d_model", "num_heads", "d_hidden")}
    if options.vocab_size is not None:
        sizes["vocab_size"] = options.vocab_size
    model = masked_lm(config.model, config.method, num_experts=config.num_experts, **sizes)
    rows = []
    for k in options.k or config.sweep_ks():
        check_k(config.method, k, config.num_experts)
        rows.append(flops_row(k, count(model, {"input_ids": _ids(**evaluation)}, k)))
        if options.step:
            ids = _ids(**training)
            inputs = {"input_ids": ids, "labels": ids}
            rows[-1]["step"] = count_step(model, config.method, inputs, k, **weights)
    print_flops({**head, "rows": rows}, options.json)


def _ids(batch: int, seq_len: int) -> torch.Tensor:
    sizes_of("bert", {"batch": batch, "seq_len": seq_len})  # each must be a whole number of at least 1
    return torch.empty(batch, seq_len, dtype=torch.int64, device="meta")


if __name__ == "__main__":
    run_main(main)
