"""A MiniLM-sized encoder as standard graphs, beside the model itself: latency at several k, and how far outputs differ.

    python -m benchmarks.graphs [--k 4 8 16] [--json results/graphs.json]

BERT with 6 layers, d 384, H 1536 (all-MiniLM-L6-v2's shape), 16 experts, random weights. At every k the model is
exported once, with a dynamic batch and length. Contenders take turns on the same input:

eager     the model as it is
exported  the program of ``torch.export``, called from Python
onnx      the same program through ``torch.onnx.export``, run by onnxruntime on as many threads as PyTorch has
aoti      the same program, compiled ahead of time by AOTInductor; takes many minutes and a C++ compiler, so only at the
          k of ``--aoti``
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import smoe
from benchmarks.options import medians, parse, timing_parser, write_record
from smoe.errors import run_main

SIZES = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
NUM_EXPERTS = 16
SHAPES = [(1, 8), (1, 24), (8, 64)]  # sentences, tokens

Run = Callable[[dict[str, Tensor]], Tensor]


def encoder(**sizes: int) -> nn.Module:
    """A BERT with random weights, its MLPs cut into experts of weight 1."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES | sizes), add_pooling_layer=False).eval()
    return smoe.modulize(model, NUM_EXPERTS, score="sum", seed=0)


def batch_of(model: nn.Module, rows: int, length: int) -> dict[str, Tensor]:
    """Random tokens; every second row is padded by a quarter."""
    ids = torch.randint(0, model.config.vocab_size, (rows, length))
    mask = torch.ones_like(ids)
    mask[1::2, length - length // 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    """The program at the model's k, for every batch and length."""
    axes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=512)}
    batch = batch_of(model, 2, 24)
    with torch.no_grad():
        return torch.export.export(model, (), batch, dynamic_shapes=dict.fromkeys(batch, axes))


def onnx_session(program: torch.export.ExportedProgram, folder: str) -> Any:
    """onnxruntime's session of the program's ONNX graph."""
    import onnxruntime

    file = str(Path(folder) / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(program, dynamo=True, verbose=False).save(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def contenders(model: nn.Module, folder: str, aoti: bool) -> dict[str, Run]:
    """name -> what computes the last hidden states (rows, length, d) of a batch."""
    program = exported(model)
    module, session = program.module(), onnx_session(program, folder)
    runs: dict[str, Run] = {
        "eager": lambda batch: model(**batch).last_hidden_state,
        "exported": lambda batch: module(**batch).last_hidden_state,
        "onnx": lambda batch: torch.from_numpy(session.run(None, {n: t.numpy() for n, t in batch.items()})[0]),
    }
    if aoti:
        file = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder) / "model.pt2"))
        compiled = torch._inductor.aoti_load_package(file)
        runs["aoti"] = lambda batch: compiled(**batch).last_hidden_state
    return runs


@torch.no_grad()
def measure(model: nn.Module, k: int, aoti: bool, options, clock: Callable[[], float]) -> list[dict]:
    """One record per shape of the batch."""
    smoe.set_top_k(model, k)
    records = []
    with tempfile.TemporaryDirectory() as folder:
        runs = contenders(model, folder, aoti)
        for rows, length in SHAPES:
            batch = batch_of(model, rows, length)
            want = runs["eager"](batch)
            differences = {name: (run(batch) - want).abs().max().item() for name, run in runs.items()}
            seconds = medians(runs, batch, options.repeats, clock)
            record = {"k": k, "sentences": rows, "tokens": length, "repeats": options.repeats}
            record["median_ms"] = {name: round(1e3 * s, 3) for name, s in seconds.items()}
            records.append(record | {"max_difference": differences})
    return records


def main() -> None:
    parser = timing_parser(__doc__)
    parser.add_argument("--k", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"])
    parser.add_argument("--aoti", type=int, nargs="*", default=[], metavar="K", help="compile ahead of time at these k")
    options, clock = parse(parser, k=NUM_EXPERTS, layers=None, aoti=NUM_EXPERTS)
    if options.aoti and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise ValueError("--aoti needs a C++ compiler, and none of c++, g++ and clang++ is on the PATH")
    model, records = encoder(num_hidden_layers=options.layers), []
    for k in options.k:
        for record in measure(model, k, k in options.aoti, options, clock):
            records.append(record)
            cells = (f"{name} {ms:.2f} ms" for name, ms in record["median_ms"].items())
            worst = max(record["max_difference"].values())
            print(
                f"k {k}, {record['sentences']} x {record['tokens']}: {', '.join(cells)}; differ by {worst:.0e}",
                flush=True,
            )
        what = "a MiniLM-sized encoder as standard graphs, milliseconds"
        write_record(options, what, layers=options.layers, num_experts=NUM_EXPERTS, records=records)


if __name__ == "__main__":
    run_main(main)
