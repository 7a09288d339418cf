"""What the paper prints ("Sparse MoE as the New Dropout", Chen et al., ICLR 2023), and its FLOPs from sizes alone.

The printed numbers stand beside ours in reports and tests; no training reads them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from .experts import check_divisible
from .methods import get_method
from .router import check_top_k

# Of one forward pass as Table 1 counts it. The MLP widths and the number of sequences of BERT and RoBERTa are not in
# the text: they are the ones that give the FLOPs of Table 1. N = 16 experts throughout.
SIZES: dict[str, dict[str, int]] = {
    "transformer_xl": {
        "num_layers": 4,
        "d_model": 256,
        "num_heads": 8,
        "d_head": 64,
        "d_hidden": 8192,
        "batch": 10,
        "tgt_len": 128,
        "mem_len": 896,
    },
    "bert": {
        "num_layers": 12,
        "d_model": 768,
        "num_heads": 12,
        "d_hidden": 6144,
        "vocab_size": 30522,
        "batch": 8,
        "seq_len": 512,
    },
    "roberta": {
        "num_layers": 12,
        "d_model": 768,
        "num_heads": 12,
        "d_hidden": 3072,
        "vocab_size": 50265,
        "batch": 8,
        "seq_len": 512,
    },
}


def _table1(rows: str) -> dict[str, dict[str, float]]:
    parsed = (row.split() for row in rows.strip().splitlines())
    return {name: {"bpc": float(bpc), "time": float(time), "flops": float(flops)} for name, bpc, time, flops in parsed}


# k_N and k_half: with all N experts, and with half of them.
_RESULTS: dict[str, Any] = {
    # Bits per character (per masked token for BERT and RoBERTa), seconds on the paper's machines, FLOPs / 1e10.
    "table1": {
        "transformer_xl": _table1("""
            dense_dropout          1.1623 5.1298 7.7579
            dense_concrete_dropout 1.3335 6.3519 7.7579
            dense_dropblock        1.2468 5.3902 7.7579
            thor_k_N               1.3110 4.8830 7.7620
            smoe_k_N               1.1896 4.7982 7.7620
            smoe_dropout_k_half    1.1776 5.0220 5.6145
            smoe_dropout_k_N       1.1486 5.0220 7.7620"""),
        "bert": _table1("""
            dense_dropout          7.6546 0.2088 135.72
            dense_concrete_dropout 7.6419 0.3031 135.72
            dense_dropblock        7.6349 0.2119 135.72
            thor_k_N               7.6434 0.1439 135.73
            smoe_k_N               7.7537 0.1387 135.73
            smoe_dropout_k_half    7.6372 0.1905 89.330
            smoe_dropout_k_N       7.6293 0.1905 135.73"""),
        "roberta": _table1("""
            dense_dropout          8.0903 0.1898 101.75
            dense_concrete_dropout 8.0820 0.2410 101.75
            dense_dropblock        8.0773 0.1934 101.75
            thor_k_N               8.0778 0.1607 101.76
            smoe_k_N               8.4291 0.1538 101.76
            smoe_dropout_k_half    6.7693 0.1799 78.558
            smoe_dropout_k_N       6.5491 0.1799 101.76"""),
    },
    # Fine-tuning: accuracy or problem solving rate in %.
    "table2": {
        arch: {
            task: dict(
                zip(
                    ("dense_dropout", "thor_k_N", "smoe_k_N", "smoe_dropout_k_half", "smoe_dropout_k_N"),
                    values,
                    strict=True,
                )
            )
            for task, values in tasks.items()
        }
        for arch, tasks in {
            "transformer_xl": {"sst2": (81.94, 81.13, 79.98, 81.60, 82.41)},
            "bert": {
                "csqa": (30.44, 20.79, 29.27, 30.32, 30.51),
                "asdiv_a": (55.27, 52.52, 55.88, 54.97, 56.30),
                "mawps": (80.47, 79.95, 80.73, 80.99, 81.25),
                "svamp": (34.24, 30.43, 33.15, 33.65, 35.33),
            },
            "roberta": {
                "asdiv_a": (49.58, 53.36, 52.10, 52.94, 55.46),
                "mawps": (78.06, 77.86, 77.86, 76.30, 78.13),
                "svamp": (28.90, 28.44, 27.98, 31.19, 33.94),
            },
        }.items()
    },
    # Distilled into a single-expert Transformer-XL, SST-2 accuracy in %.
    "table3": {"sst2": {"dense_dropout": 81.25, "thor": 80.76, "smoe": 80.12, "smoe_dropout": 82.01}},
    # SST-2 accuracy in %: mean and standard deviation of 3 runs.
    "tableA4": {
        "sst2": {
            "dense_dropout": [81.39, 0.31],
            "thor_k_N": [81.15, 0.55],
            "smoe_k_N": [81.20, 0.50],
            "smoe_dropout_k_half": [82.03, 0.26],
            "smoe_dropout_k_N": [82.32, 0.14],
        }
    },
    # SST-2 accuracy in % over the number of activated experts.
    "tableA5": {
        "k": [1, 2, 4, 8, 16],
        "smoe_fixed_k": [80.06, 80.79, 80.58, 80.99, 81.20],
        "smoe_growing_k": [79.40, 81.02, 81.13, 81.71, 81.51],
        "smoe_dropout": [79.02, 81.25, 82.00, 82.03, 82.32],
    },
    # BERT on HotpotQA, in %.
    "tableA6": {
        "exact_match": {"dense_dropout": 15.10, "smoe": 14.90, "smoe_dropout": 15.20},
        "compositionality_gap": {"dense_dropout": 14.90, "smoe": 15.00, "smoe_dropout": 14.70},
    },
    # The text's claims; the second is computed from Table 1.
    "headline": {
        "training_time_saving_vs_slowest_dense_percent": {"transformer_xl": 21, "bert": 37, "roberta": 25},
        "training_time_saving_vs_dense_dropout_percent": {"transformer_xl": 2.1, "bert": 8.8, "roberta": 5.2},
        "inference_flops_saving_at_half_percent": {"low": 23, "high": 34},
    },
}


def paper_results() -> dict[str, Any]:
    """Every number of the paper's tables, by table, as plain data of the caller's own.

    ``paper_results()["table1"]["bert"]["smoe_dropout_k_half"]`` is ``{"bpc": ..., "time": ..., "flops": ...}``, with
    bits per character (bits per masked token), seconds and FLOPs in units of 1e10. Keys: ``table1``, ``table2``,
    ``table3``, ``tableA4``, ``tableA5``, ``tableA6``, ``headline``.
    """
    return copy.deepcopy(_RESULTS)


def paper_flops(arch: str, method: str, k: int | None = None, *, num_experts: int = 16, **sizes: int) -> int:
    """FLOPs of one forward pass by Table 1's convention, from sizes alone.

    Transformer-XL projects queries, keys and values for memory and current tokens alike (the released model), and its
    softmax head does not count; BERT and RoBERTa count the masked-LM head with its decoder to the vocabulary.

    Args:
        arch: ``transformer_xl``, ``bert`` or ``roberta``.
        k: experts activated; None means all of them. A dense method has none.
        sizes: replace those of ``smoe.paper.SIZES[arch]``.
    """
    s = sizes_of(arch, sizes)
    check_k(method, k, num_experts)
    d, batch = s["d_model"], s["batch"]
    mlp = 2 * d * s["d_hidden"]  # multiply-adds per token
    if get_method(method).routed:
        d_expert = check_divisible(s["d_hidden"], num_experts)
        mlp = num_experts * d + (num_experts if k is None else k) * 2 * d * d_expert
    if arch == "transformer_xl":
        inner, context, tokens = s["num_heads"] * s["d_head"], s["mem_len"] + s["tgt_len"], batch * s["tgt_len"]
        attention = batch * context * 3 * d * inner + context * d * inner + tokens * inner * d
        head = 0
    else:
        tokens = batch * s["seq_len"]
        attention = tokens * 4 * d * d
        head = tokens * (d * d + d * s["vocab_size"])
    return 2 * (s["num_layers"] * (attention + tokens * mlp) + head)


def table1() -> list[dict[str, Any]]:
    """Table 1's FLOPs column, cell by cell: ``arch``, ``row``, ``method``, ``k``, ``flops`` (ours, by the paper's
    convention), ``paper`` (as printed) and ``difference`` (relative)."""
    cells = []
    for arch, rows in paper_results()["table1"].items():
        for row, values in rows.items():
            method, _, budget = row.partition("_k_")
            k = {"": None, "half": 8, "N": 16}[budget]
            flops, printed = paper_flops(arch, method, k), values["flops"] * 1e10
            cells.append(
                {"arch": arch, "row": row, "method": method, "k": k, "flops": flops, "paper": printed}
                | {"difference": flops / printed - 1}
            )
    return cells


def check_k(method: str, k: int | None, num_experts: int) -> None:
    """ValueError unless k is None, or ``method`` has experts and at least k of them."""
    if k is None:
        get_method(method)
    elif not get_method(method).routed:
        raise ValueError(f"k is {k}, but {method} has no experts; leave k out")
    else:
        check_top_k(k, num_experts)


def sizes_of(arch: str, sizes: Mapping[str, int]) -> dict[str, int]:
    """``SIZES[arch]`` with ``sizes`` in place of its own; ValueError for an unknown architecture or size."""
    if arch not in SIZES:
        raise ValueError(f"arch is {arch!r}; it must be one of {', '.join(SIZES)}")
    for name, value in sizes.items():
        if name not in SIZES[arch]:
            raise ValueError(f"{name} is not a size of {arch}; it must be one of {', '.join(SIZES[arch])}")
        least = 0 if name == "mem_len" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    return SIZES[arch] | dict(sizes)
