"""llama.cpp at every k: an exported Mixtral through llama.cpp's own converter and runtime, beside smoe.

    python -m venv gguf && . gguf/bin/activate            # an environment to throw away
    pip install -e .[hf] sentencepiece
    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && tar xzf llama_cpp_python-0.3.36.tar.gz
    pip install ./llama_cpp_python-0.3.36                 # builds llama.cpp with cmake
    python -m examples.llama_bytes --out runs/llama_bytes
    python -m benchmarks.gguf runs/llama_bytes/smoe --source llama_cpp_python-0.3.36 --text data/enwik8/valid.bin

MODEL is a folder that ``smoe.save_pretrained`` wrote, of a model that ``smoe export --to hf`` turns into a Mixtral,
with a SentencePiece tokenizer (``tokenizer.model``) beside it. It is exported, converted to GGUF in float32, and run
with k set by llama.cpp alone, as ``llama-cli --override-kv llama.expert_used_count=int:k`` does.

For each k: the mean absolute difference of the log-probabilities of all next tokens, llama.cpp's to smoe's, bits per
token of both, and llama.cpp's tokens per second, generating one after the other and reading a prompt (medians; the k
take turns). Ends with exit code 1 if a difference is not below --tolerance.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import smoe
from benchmarks.options import parse, timing_parser, write_record
from smoe.errors import RunError, run_main

EXPERT_COUNT = "llama.expert_used_count"  # GGUF's name for k; a Mixtral's architecture is called llama there


def convert(folder: Path, source: Path, gguf: Path) -> None:
    """A Hugging Face folder -> a GGUF file in float32, by llama.cpp's converter."""
    script = source / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
    if not script.is_file():
        raise ValueError(f"--source is {source}; it must be the unpacked sdist of llama-cpp-python")
    command = [sys.executable, str(script), str(folder), "--outtype", "f32", "--outfile", str(gguf)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"the converter failed: {done.stderr.strip().splitlines()[-1]}")


def load(gguf: Path, k: int, tokens: int, threads: int) -> Any:
    """llama.cpp's model with k experts per token, its cache in float32 like its weights."""
    from llama_cpp import GGML_TYPE_F32, Llama

    return Llama(
        str(gguf),
        kv_overrides={EXPERT_COUNT: k},
        n_ctx=tokens + 8,
        n_batch=tokens,
        n_threads=threads,
        n_threads_batch=threads,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        logits_all=True,
        verbose=False,
    )


def log_probabilities(model: Any, ids: list[int]) -> np.ndarray:
    """(tokens, vocabulary) of every next token, by llama.cpp."""
    model.reset()
    model.eval(ids)
    logits = torch.from_numpy(np.array(model.scores[: len(ids)], dtype=np.float64))
    return torch.log_softmax(logits, dim=-1).numpy()


@torch.no_grad()
def our_log_probabilities(model: torch.nn.Module, ids: list[int], k: int) -> np.ndarray:
    """The same by smoe."""
    with smoe.activated(model, k):
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1).numpy()


def speeds(
    models: dict[int, Any], ids: list[int], repeats: int, clock: Callable[[], float]
) -> dict[int, dict[str, float]]:
    """Tokens per second: ``generate``, one token after the other, and ``prompt``, all at once; medians."""
    seconds: dict[int, dict[str, list[float]]] = {k: {"generate": [], "prompt": []} for k in models}
    some = ids[: min(len(ids), 64)]
    for repeat in range(repeats + 1):
        for k, model in models.items():
            model.reset()
            began = clock()
            model.eval(ids)
            read = clock()
            model.reset()
            start = clock()
            for token in some:
                model.eval([token])
            end = clock()
            if repeat:  # the first round warms up
                seconds[k]["prompt"].append((read - began) / len(ids))
                seconds[k]["generate"].append((end - start) / len(some))
    return {k: {name: round(1 / statistics.median(s), 1) for name, s in of.items()} for k, of in seconds.items()}


def measure(args: argparse.Namespace, clock: Callable[[], float]) -> dict[str, Any]:
    """The record: one row for each k."""
    import llama_cpp
    import transformers
    from sentencepiece import SentencePieceProcessor

    from smoe.export import to_hf

    model = smoe.from_pretrained(args.model)
    with tempfile.TemporaryDirectory() as folder:
        hf = to_hf(model, Path(folder) / "hf", tokenizer=args.model)
        gguf = Path(folder) / "model.gguf"
        convert(hf, args.source, gguf)
        size = gguf.stat().st_size
        models = {k: load(gguf, k, args.tokens, torch.get_num_threads()) for k in args.k}
        text = args.text.read_bytes()[: 16 * args.tokens].decode("utf-8", errors="ignore")
        ids = SentencePieceProcessor(model_file=str(args.model / "tokenizer.model")).encode(text)[: args.tokens]
        # llama.cpp's own tokenizer must agree, else it would be asked about another text.
        theirs = models[args.k[0]].tokenize(text.encode(), add_bos=False)[: args.tokens]
        rows, targets = [], np.array(ids[1:])
        for k, llama in models.items():
            ours, cpp = our_log_probabilities(model, ids, k), log_probabilities(llama, ids)
            bits = [-p[np.arange(len(targets)), targets].mean() / math.log(2) for p in (ours, cpp)]
            difference = np.abs(ours - cpp)
            row = {"k": k, "mean_difference": float(difference.mean()), "largest_difference": float(difference.max())}
            rows.append({**row, "bits_per_token": round(bits[0], 6), "bits_per_token_llama_cpp": round(bits[1], 6)})
        for row, speed in zip(rows, speeds(models, ids, args.repeats, clock).values(), strict=True):
            row |= {f"{name}_tokens_per_second": value for name, value in speed.items()}
    versions = {module.__name__: module.__version__ for module in (smoe, transformers, llama_cpp)}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "gguf_bytes": size,
        "tokens": len(ids),
        "same_tokenization": theirs == ids,
        "repeats": args.repeats,
        "versions": versions,
        "by_k": rows,
    }


def main() -> None:
    parser = timing_parser(__doc__)
    parser.add_argument("model", metavar="MODEL", type=Path)
    parser.add_argument("--source", type=Path, required=True, help="the unpacked sdist of llama-cpp-python")
    parser.add_argument("--text", type=Path, required=True, help="a text file to read; its beginning is used")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of the text that are compared")
    parser.add_argument("--k", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--tolerance", type=float, default=0.02, help="of the mean difference (default: 0.02)")
    args, clock = parse(parser, tokens=None, k=None)
    if args.device != "cpu":
        raise ValueError(f"--device is {args.device}; llama.cpp runs on the CPU here")
    result = measure(args, clock)
    write_record(args, "log-probabilities of next tokens by llama.cpp (GGUF, float32) and by smoe; its speed", **result)
    for row in result["by_k"]:
        print("  ".join(f"{key} {value:.6g}" for key, value in row.items()))
    if not result["same_tokenization"]:
        raise RunError("llama.cpp cuts the text into other tokens")
    worst = max(row["mean_difference"] for row in result["by_k"])
    if not worst < args.tolerance:
        raise RunError(f"the mean difference is {worst:.4f}; it must be below {args.tolerance}")


if __name__ == "__main__":
    run_main(main)
