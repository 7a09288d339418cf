"""Fine-tunes a Transformer-XL to classify sentences (SST-2, Table 2), from a pretrained run or from scratch.

    python -m transformer_xl.classify --run RUN --run_dir runs/sst2           # its method, sizes and weights
    python -m transformer_xl.classify --run RUN --run_dir runs/half --k_max 8 # with half of the experts
    python -m transformer_xl.classify --method smoe --run_dir runs/scratch    # without pretraining

A linear layer on the last layer's output at a sentence's last byte gives the classes. All experts are activated
throughout, unless ``--k_min``, ``--k_max`` and ``--schedule`` say otherwise.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe.errors import run_main
from smoe.flops import count, count_step
from smoe.metrics import Metric
from smoe.options import option
from smoe.schedule import Mode
from smoe.train.command import run_training
from smoe.train.evaluate import read_run
from smoe.train.folder import RunFolder
from smoe.train.task import Task, equal_share
from transformer_xl.config import LanguageModelConfig, RunConfig
from transformer_xl.model import TransformerXL

# What a pretrained run decides: its weights fit no other model.
_OF_THE_RUN = ("method", "num_layers", "d_model", "num_heads", "d_head", "d_hidden", "num_experts", "layers")
_OF_THE_RUN += ("router", "score", "output_scale")


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(RunConfig):
    """One run of a Transformer-XL as a classifier."""

    scales_file: ClassVar[Path] = Path(__file__).parent / "configs" / "classification.yaml"

    run: str | None = option(None, "the pretrained run to start from; null: from scratch")
    data: str = option("data/sst2", "a folder of data/sst2/prepare.py")
    seq_len: int = option(256, "of a longer sentence the last so many bytes", at_least=1)
    schedule: Mode | None = "constant"

    @classmethod
    def inherited(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        if given.get("run") is None:
            return {}
        recorded = RunFolder(given["run"]).read_config()
        return {name: recorded[name] for name in _OF_THE_RUN if name in recorded}

    def k_schedule(self) -> tuple[int, int, str]:
        k_max = self.num_experts if self.k_max is None else self.k_max
        return k_max if self.k_min is None else self.k_min, k_max, self.schedule or "constant"

    def for_evaluation(self) -> ClassifyConfig:
        return dataclasses.replace(super().for_evaluation(), run=None)


class ClassifierOutput(NamedTuple):
    """``loss``: mean nats per sentence; ``logits (B, classes)``; both float32."""

    loss: Tensor
    logits: Tensor


class Classifier(nn.Module):
    """A Transformer-XL with a linear layer on the output at the last byte of each sentence."""

    def __init__(self, encoder: TransformerXL, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.encoder.output_bias.requires_grad_(False)  # of the language model's head, which is not used
        self.head = nn.Linear(encoder.config.d_model, num_classes)

    def forward(self, input_ids: Tensor, lengths: Tensor, labels: Tensor) -> ClassifierOutput:
        """``input_ids (B, T)``, padded at the end; ``lengths (B,)``; ``labels (B,)``, -100 where one doesn't count."""
        hidden, _ = self.encoder.encode(input_ids)
        last = hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1]
        logits = self.head(self.encoder.dropout(last)).float()
        return ClassifierOutput(F.cross_entropy(logits, labels), logits)


class Classification(Task):
    """Classifies sentences. SST-2's test split has no public labels, so its 872 dev sentences are what is reported."""

    name = "classification"
    metrics = (Metric("accuracy", "Accuracy", "share of n examples", "higher"),)
    splits = ("valid",)
    config_class = ClassifyConfig
    architecture, title = "transformer_xl", "Transformer-XL classifier"
    config: ClassifyConfig

    def __init__(self, config: ClassifyConfig, rank: int, world_size: int) -> None:
        super().__init__(config, rank, world_size)
        self.dataset, self.data = _read(Path(config.data), config.seq_len)
        train, size = self.data["train"], config.batch_size
        if size > len(train):
            raise ValueError(f"batch_size is {size}; it must be at most the {len(train)} sentences to train on")
        self.share = equal_share(size, rank, world_size)
        self.tokens_per_step = round(size * sum(len(text) for text, _ in train) / len(train))
        self.step_shape = f"{size} sentences"
        torch.manual_seed(config.seed)
        self.model = self.build_model()
        self.blocks = self.model.encoder.layers
        if config.run is not None:
            pretrained, checkpoint = read_run(config.run, LanguageModelConfig, "a Transformer-XL")
            for name in _OF_THE_RUN:
                asked, needed = getattr(config, name), getattr(pretrained, name)
                if asked != needed:
                    raise ValueError(f"{name} is {asked!r}, but the weights of {config.run} need {needed!r}")
            self.model.encoder.load_state_dict(checkpoint.tensors["model"])
            self.record["pretrained"] = {"scale": pretrained.scale, "seed": pretrained.seed, "step": checkpoint.step}

    def build_model(self) -> Classifier:
        return Classifier(self.config.build_model(), num_classes=2)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Every sentence once an epoch, in an order that is drawn from (seed, epoch)."""
        train, size = self.data["train"], self.config.batch_size
        epoch, within = divmod(step, len(train) // size)
        order = np.random.default_rng([self.config.seed, epoch]).permutation(len(train))
        return _padded([train[i] for i in order[within * size : (within + 1) * size][self.share]])

    def forward(self, model: nn.Module, batch: tuple[Tensor, ...], device: torch.device) -> ClassifierOutput:
        return model(*(part.to(device) for part in batch))

    def passes(self, model: nn.Module, split: str, device: torch.device) -> Iterator[Tensor]:
        rows, size, ranks = self.data[split], self.config.eval_batch_size, self.world_size
        mine = rows[self.rank * len(rows) // ranks : (self.rank + 1) * len(rows) // ranks]
        for start in range(0, -(-len(rows) // ranks), size):
            # Where other processes have one more pass, a sentence that does not count.
            batch = _padded(mine[start : start + size] or [(rows[0][0], -100)])
            right = self.forward(model, batch, device).logits.argmax(-1).cpu() == batch[2]
            yield torch.stack((right.sum(), (batch[2] >= 0).sum())).double().to(device)

    def values(self, sums: list[float]) -> dict[str, float]:
        right, examples = sums
        return {"accuracy": right / examples}

    def flops(self, model: nn.Module, k: int | list[int] | None) -> dict[str, int]:
        c = self.config
        weights = {"balance_weight": c.balance_weight, "consistency_weight": c.consistency_weight}
        one_pass, batch = (_padded([(b" " * c.seq_len, 0)] * size) for size in (c.eval_batch_size, c.batch_size))
        counted, step = count(model, one_pass, k), count_step(model, c.method, batch, k, **weights)
        return {"paper": counted.paper_linear, "true": counted.true, "training_step": step}

    def where(self, step: int) -> str:
        epoch, within = divmod(step, len(self.data["train"]) // self.config.batch_size)
        return f"epoch {epoch}, batch {within} of the data"


def _read(folder: Path, seq_len: int) -> tuple[dict[str, Any], dict[str, list[tuple[bytes, int]]]]:
    """The record and the sentences of a prepared folder, checked against its meta.json and cut to ``seq_len`` bytes."""
    advice = f"run: python data/sst2/prepare.py --out {folder}"
    try:
        meta, data = json.loads((folder / "meta.json").read_text(encoding="utf-8")), {}
        for split in ("train", "valid"):
            part = meta["splits"][split]
            content = (folder / part["file"]).read_bytes()
            if hashlib.sha256(content).hexdigest() != part["sha256"]:
                raise ValueError(f"{split} has not the SHA-256 of meta.json")
            rows = [json.loads(line) for line in content.splitlines()]
            if odd := [row["label"] for row in rows if row["label"] not in (0, 1)]:
                raise ValueError(f"label {odd[0]!r}, expected 0 or 1")
            data[split] = [(row["text"].encode()[-seq_len:] or b" ", row["label"]) for row in rows]
        return {"name": str(meta["dataset"]), "sha256": str(meta["sha256"])}, data
    except OSError as error:
        raise ValueError(f"data: no prepared data set in {folder} ({error.strerror}); {advice}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"data: {folder} is damaged ({error}); {advice} --force") from None


def _padded(rows: list[tuple[bytes, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (B, T), lengths and labels (B,). Causal attention never reads the zeros that pad the end."""
    texts = [torch.from_numpy(np.frombuffer(text, dtype=np.uint8).astype(np.int64)) for text, _ in rows]
    labels = torch.tensor([label for _, label in rows])
    return nn.utils.rnn.pad_sequence(texts, batch_first=True), torch.tensor([len(text) for text in texts]), labels


def main() -> None:
    run_training(Classification, prog="python -m transformer_xl.classify")


if __name__ == "__main__":
    run_main(main)
