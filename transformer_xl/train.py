"""Trains a Transformer-XL on enwik8 with any method of Table 1, then sweeps over the number of activated experts.

    python -m transformer_xl.train --method smoe_dropout --scale cpu --data data/enwik8 --run_dir runs/mine
    torchrun --nproc_per_node 8 -m transformer_xl.train --method smoe_dropout --scale paper --run_dir runs/paper
    python -m transformer_xl.train ... --resume          # goes on, bit for bit, where the last checkpoint was

Every field of ``LanguageModelConfig`` is a flag. The run folder is described in ``smoe/train/folder.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from smoe.errors import run_main
from smoe.flops import count_step
from smoe.metrics import BPC
from smoe.train.command import run_training
from smoe.train.task import Task
from transformer_xl.config import LanguageModelConfig
from transformer_xl.cost import evaluation_flops, meta_inputs
from transformer_xl.data import SegmentStream, evaluation_segments, load_data
from transformer_xl.model import TransformerXL, TransformerXLOutput


class LanguageModel(Task):
    """Predicts the next byte. A segment's memory is what the segments before it have left."""

    name = "language_model"
    metrics = (BPC,)
    architecture = "transformer_xl"
    title = "Transformer-XL"
    config_class = LanguageModelConfig
    config: LanguageModelConfig

    def __init__(self, config: LanguageModelConfig, rank: int, world_size: int) -> None:
        super().__init__(config, rank, world_size)
        self.data, self.dataset = load_data(config.data)
        self.stream = SegmentStream(self.data["train"], config.batch_size, config.tgt_len, rank, world_size)
        for split in self.splits:
            self._segments(split)  # whether there are enough bytes
        self.tokens_per_step = config.batch_size * config.tgt_len
        self.step_shape = f"{config.batch_size} x {config.tgt_len} bytes"
        torch.manual_seed(config.seed)
        self.model = self.build_model()
        self.blocks = self.model.layers
        self.memory: Tensor | None = None  # (layers, this process's rows, positions, d_model)

    def build_model(self) -> TransformerXL:
        return self.config.build_model()

    def batch(self, step: int) -> tuple[Tensor, Tensor, bool]:
        return self.stream.segment(step)

    def forward(
        self, model: nn.Module, batch: tuple[Tensor, Tensor, bool], device: torch.device
    ) -> TransformerXLOutput:
        inputs, targets, starts_epoch = batch
        memory = None if starts_epoch else self.memory
        return model(inputs.to(device), targets.to(device), memory, self.config.mem_len)

    def carry(self, output: TransformerXLOutput) -> None:
        self.memory = output.memory

    def passes(self, model: nn.Module, split: str, device: torch.device) -> Iterator[Tensor]:
        memory = None
        for inputs, targets in self._segments(split):
            output = model(inputs.to(device), targets.to(device), memory, self.config.eval_mem_len)
            memory = output.memory
            tokens = int((targets >= 0).sum())
            nats = output.loss.double() * tokens if tokens else output.logits.new_zeros((), dtype=torch.float64)
            yield torch.stack((nats, nats.new_tensor(tokens)))

    def values(self, sums: list[float]) -> dict[str, float]:
        nats, tokens = sums
        return {BPC.key: nats / tokens / math.log(2)}

    def flops(self, model: nn.Module, k: int | None) -> dict[str, int]:
        c = self.config
        counted = evaluation_flops(model, k, batch=c.eval_batch_size, tgt_len=c.eval_tgt_len, mem_len=c.eval_mem_len)
        weights = {"balance_weight": c.balance_weight, "consistency_weight": c.consistency_weight}
        step = count_step(model, c.method, meta_inputs(model, c.batch_size, c.tgt_len, c.mem_len), k, **weights)
        return {"paper": counted["paper"], "true": counted["true"], "training_step": step}

    def state(self) -> dict[str, Tensor]:
        if self.memory is None or self.memory.numel() == 0:
            return {}
        return {"memory": self.memory.transpose(0, 1)}  # rows first, to be joined in order

    def load_state(self, state: dict[str, Tensor], device: torch.device) -> None:
        if "memory" in state:
            self.memory = state["memory"].transpose(0, 1)[:, self.stream.share].to(device)

    def where(self, step: int) -> str:
        epoch, within = divmod(step, self.stream.segments_per_epoch)
        return f"epoch {epoch}, segment {within} of the data"

    def _segments(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        c = self.config
        share = (self.rank, self.world_size)
        return evaluation_segments(self.data[split], c.eval_batch_size, c.eval_tgt_len, *share, c.eval_tokens)


def main() -> None:
    run_training(LanguageModel, prog="python -m transformer_xl.train")


if __name__ == "__main__":
    run_main(main)
