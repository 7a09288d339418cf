"""A small Llama learns bytes with a growing number of experts, and leaves as a Mixtral that runs without smoe.

    python data/enwik8/prepare.py
    python -m examples.llama_bytes --out runs/llama_bytes [--steps 1000]

Writes ``smoe/`` (the modulized model), ``hf/`` (the exported one, with a tokenizer that llama.cpp reads too) and
``result.json``: bits per byte on the validation text at every k, by both.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import smoe

from .byte_tokenizer import VOCAB_SIZE, encode, save

NUM_EXPERTS = 16
KS = (1, 2, 4, 8, 16)


def build(seed: int) -> torch.nn.Module:
    """A Llama of 3 layers whose MLPs are 16 experts each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=None,
    )
    return smoe.modulize(LlamaForCausalLM(config), NUM_EXPERTS, output_scale="num_experts", seed=seed)


def train(model: torch.nn.Module, text: Tensor, steps: int, batch: int, length: int, lr: float, seed: int) -> None:
    """AdamW with warm-up and cosine decay; k grows from N / 2 to N."""
    optimizer = torch.optim.AdamW(smoe.parameter_groups(model, weight_decay=0.1), lr=lr, betas=(0.9, 0.95))
    generator, began = torch.Generator().manual_seed(seed), time.perf_counter()
    model.train()
    for step in range(steps):
        smoe.set_top_k(model, smoe.k_at(step, steps, k_min=NUM_EXPERTS // 2, k_max=NUM_EXPERTS))
        warm, part = min(1.0, (step + 1) / 30), step / steps
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * part)))
        starts = torch.randint(len(text) - length - 1, (batch,), generator=generator)
        rows = torch.stack([text[start : start + length + 1] for start in starts])
        loss = F.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            bpc, seconds = loss.item() / math.log(2), time.perf_counter() - began
            print(f"step {step} k {smoe.get_top_k(model)} BPC {bpc:.3f} seconds {seconds:.0f}", flush=True)


@torch.no_grad()
def bits_per_byte(model: torch.nn.Module, text: Tensor, length: int) -> float:
    """Bits per byte of ``text``, in windows of ``length`` tokens that know nothing of one another."""
    model.eval()
    windows = text[: (len(text) - 1) // length * length + 1]
    inputs, targets = windows[:-1].view(-1, length), windows[1:].view(-1, length)
    total = 0.0
    for x, y in zip(inputs.split(16), targets.split(16), strict=True):
        total += F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten(), reduction="sum").item()
    return total / targets.numel() / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/enwik8"), help="folder with train.bin and valid.bin")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--length", type=int, default=128, help="bytes of a sequence")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--eval_bytes", type=int, default=32_768)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    texts = {split: torch.from_numpy(encode((args.data / f"{split}.bin").read_bytes())) for split in ("train", "valid")}
    valid = texts["valid"][: args.eval_bytes]
    model = build(args.seed)
    train(model, texts["train"], args.steps, args.batch, args.length, args.lr, args.seed)
    ours = {}
    for k in KS:
        smoe.set_top_k(model, k)
        ours[k] = bits_per_byte(model, valid, args.length)
    smoe.save_pretrained(model, args.out / "smoe")
    save(args.out / "smoe")
    export(args.out, ours)
    exported = {}
    for k in KS:
        exported[k] = bits_per_byte(load_exported(args.out / "hf", k), valid, args.length)
    result = {"steps": args.steps, "seed": args.seed, "eval_bytes": len(valid), "smoe": ours, "exported": exported}
    (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    for k in KS:
        print(f"k {k}: BPC {ours[k]:.6f}, exported {exported[k]:.6f}")


def export(out: Path, bpc: dict[int, float]) -> None:
    """``out/smoe`` -> ``out/hf``. On the command line: smoe export OUT/smoe --to hf --out OUT/hf."""
    from smoe.export import to_hf

    to_hf(smoe.from_pretrained(out / "smoe"), out / "hf", metrics={k: {"BPC": value} for k, value in bpc.items()})


def load_exported(folder: Path, k: int) -> torch.nn.Module:
    """The exported model with k experts per token; nothing of smoe is used."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, num_experts_per_tok=k)


if __name__ == "__main__":
    main()
