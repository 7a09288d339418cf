"""Pretrains a BERT or RoBERTa by masked language modelling with any method of Table 1, then sweeps over k.

    python -m bert.pretrain --model bert --method smoe_dropout --scale cpu --data DIR --run_dir runs/mine
    torchrun --nproc_per_node 8 -m bert.pretrain --model roberta --method smoe_dropout --scale paper --run_dir runs/big
    python -m bert.pretrain ... --resume          # goes on, bit for bit, where the last checkpoint was

Every field of ``PretrainConfig`` is a flag. The run folder is described in ``smoe/train/folder.py``; the vocabulary,
tokenizer.json, is put there too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bert.config import PretrainConfig
from bert.data import Blocks, MaskedBatch, TrainingBatches, evaluation_batches
from bert.floors import floors, masked_tokens
from bert.model import MaskedLM, MaskedLMOutput, build_model
from bert.start import start_from
from smoe.errors import run_main
from smoe.flops import count, count_step
from smoe.metrics import BITS_PER_MASKED_TOKEN
from smoe.train.command import run_training
from smoe.train.task import Task


class MaskedLanguageModel(Task):
    """Predicts the tokens that are masked (Devlin et al. 2019, 3.1)."""

    name = "masked_lm"
    metrics = (BITS_PER_MASKED_TOKEN,)
    config_class = PretrainConfig
    config: PretrainConfig

    def __init__(self, config: PretrainConfig, rank: int, world_size: int) -> None:
        super().__init__(config, rank, world_size)
        self.architecture = self.title = config.model
        self.corpus = Blocks(config.data, config.model, config.scale)
        self.vocabulary = self.corpus.vocabulary
        self.data = {split: self.corpus.sequences(split, config.seq_len) for split in ("train", *self.splits)}
        self.dataset = self.corpus.record
        self.batches = TrainingBatches(
            self.data["train"],
            self.vocabulary,
            config.batch_size,
            config.mask_share,
            config.seed,
            rank,
            world_size,
        )
        self.tokens_per_step = config.batch_size * config.seq_len
        self.step_shape = f"{config.batch_size} x {config.seq_len} tokens"
        self.facts = {"vocabulary": dataclasses.asdict(self.vocabulary)}
        torch.manual_seed(config.seed)
        self.model = self.build_model()
        self.blocks = self.bare().base_model.encoder.layer
        if config.start_from is not None:
            tokenizer = self.corpus.folder / "tokenizer.json"
            self.record["start_from"] = start_from(config.start_from, self.bare(), tokenizer)

    def build_model(self) -> MaskedLM:
        return MaskedLM(build_model(self.config, self.vocabulary))

    def bare(self) -> PreTrainedModel:
        return self.model.model

    def batch(self, step: int) -> MaskedBatch:
        return self.batches.batch(step)

    def evaluation_batches(self, split: str, rank: int = 0, world_size: int = 1) -> Iterator[MaskedBatch]:
        """What ``split`` is measured on."""
        c = self.config
        sizes = (c.eval_batch_size, c.mask_share, rank, world_size, c.eval_sequences)
        return evaluation_batches(self.data[split], self.vocabulary, *sizes)

    def forward(self, model: nn.Module, batch: MaskedBatch, device: torch.device) -> MaskedLMOutput:
        return model(*(part.to(device) for part in batch))

    def passes(self, model: nn.Module, split: str, device: torch.device) -> Iterator[Tensor]:
        """The masks are always the same."""
        for batch in self.evaluation_batches(split, self.rank, self.world_size):
            loss = self.forward(model, batch, device).loss.double()
            tokens = int((batch.targets >= 0).sum())
            nats = loss * tokens if tokens else torch.zeros_like(loss)
            yield torch.stack((nats, nats.new_tensor(tokens)))

    def values(self, sums: list[float]) -> dict[str, float]:
        nats, tokens = sums
        return {BITS_PER_MASKED_TOKEN.key: nats / tokens / math.log(2)}

    def flops(self, model: nn.Module, k: int | None) -> dict[str, int]:
        c = self.config

        def ids(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.int64, device="meta")

        masked = max(round(c.mask_share * c.seq_len), 1)
        step = {"input_ids": ids(c.batch_size, c.seq_len)}
        step |= {name: ids(c.batch_size, masked) for name in ("positions", "targets")}
        weights = {"balance_weight": c.balance_weight, "consistency_weight": c.consistency_weight}
        counted = count(model.model, {"input_ids": ids(c.eval_batch_size, c.seq_len)}, k)
        training = count_step(model, c.method, step, k, **weights)
        return {"paper": counted.paper_linear, "true": counted.true, "training_step": training}

    def where(self, step: int) -> str:
        return self.batches.where(step)

    def files(self) -> list[Path]:
        return [self.corpus.folder / "tokenizer.json"]

    def notes(self) -> list[str]:
        note = f" ({self.corpus.meta['note']})" if self.corpus.meta["note"] else ""
        lines = [f"data: {self.corpus.meta['dataset']}{note}, vocabulary of {self.vocabulary.size}"]
        # Counted here, not in __init__: a run that is only evaluated doesn't need them.
        splits = {split: masked_tokens(self.evaluation_batches(split)) for split in self.splits}
        self.record["floors"] = floors(self.data["train"], splits, self.vocabulary)
        told = ", ".join(f"{name} {bits['valid']:.3f}" for name, bits in self.record["floors"].items())
        lines.append(f"floors, in bits per masked token of valid: {told}")
        length, seq_len = self.corpus.block_length, self.config.seq_len
        if length != seq_len:
            cut = f"each block of {length} tokens is cut into {length // seq_len} sequences of seq_len = {seq_len}"
            lines.append(f"note: {cut}, of which only the first starts with [CLS] or <s>")
        return lines


def main() -> None:
    run_training(MaskedLanguageModel, prog="python -m bert.pretrain")


if __name__ == "__main__":
    run_main(main)
