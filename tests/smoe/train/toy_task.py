"""The smallest task: it labels points by the sector they lie in. It shows that the loop has room for tasks."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe.metrics import Metric
from smoe.options import option
from smoe.train.command import run_training
from smoe.train.config import TrainConfig
from smoe.train.examples import count_flops
from smoe.train.processes import Processes
from smoe.train.task import Task

ACCURACY = Metric("accuracy", "Accuracy", "share of n examples", "higher")
CROSS_ENTROPY = Metric("cross_entropy", "Cross-entropy", "nats", "lower")
POINTS = {"train": 200, "valid": 50, "test": 70}


@dataclass(frozen=True, kw_only=True)
class ToyConfig(TrainConfig):
    scales_file = Path(__file__).with_name("toy_task.yaml")

    classes: int = option(3, "number of sectors")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes < 2:
            raise ValueError(f"classes is {self.classes}; it must be at least 2")


class Output(NamedTuple):
    loss: Tensor
    logits: Tensor


class Classifier(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.up = nn.Linear(2, config.d_model)
        self.layers = nn.ModuleList(config.make_mlp(layer) for layer in range(config.num_layers))
        self.down = nn.Linear(config.d_model, config.classes)
        if os.environ.get("TOY_SPARE"):
            self.spare = nn.Linear(2, 2)

    def forward(self, points: Tensor, labels: Tensor) -> Output:
        x = self.up(points)
        for layer in self.layers:
            x = x + layer(x)
        logits = self.down(x)
        return Output(F.cross_entropy(logits, labels), logits)


class Toy(Task):
    name = "toy"
    metrics = (ACCURACY, CROSS_ENTROPY)
    architecture = title = "classifier"
    config_class = ToyConfig

    def __init__(self, config: ToyConfig, rank: int, world_size: int) -> None:
        super().__init__(config, rank, world_size)
        points = torch.randn(sum(POINTS.values()), 2, generator=torch.Generator().manual_seed(0))
        angle = torch.atan2(points[:, 0], points[:, 1]) / (2 * torch.pi) + 0.5
        labels = (angle * config.classes).long().clamp(max=config.classes - 1)
        parts = (part.split(list(POINTS.values())) for part in (points, labels))
        self.data = dict(zip(POINTS, zip(*parts, strict=True), strict=True))
        self.dataset = {"name": "sectors", "sha256": f"{config.classes}"}
        self.tokens_per_step, self.step_shape = config.batch_size, f"{config.batch_size} points"
        torch.manual_seed(config.seed)
        self.model = self.build_model()
        self.blocks = self.model.layers

    def build_model(self) -> Classifier:
        return Classifier(self.config)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        if os.environ.get("TOY_STOP_AT") == str(step):
            os.kill(os.getpid(), signal.SIGTERM)
        points, labels = self.data["train"]
        drawn = torch.randint(len(points), (self.config.batch_size,), generator=torch.Generator().manual_seed(step))
        mine = drawn[self.rank :: self.world_size]
        return points[mine], labels[mine]

    def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor], device: torch.device) -> Output:
        return model(*(part.to(device) for part in batch))

    def passes(self, model: nn.Module, split: str, device: torch.device):
        points, labels = (part[self.rank :: self.world_size].to(device) for part in self.data[split])
        output = model(points, labels)
        right = (output.logits.argmax(-1) == labels).sum()
        yield torch.stack((right, output.loss * len(labels), torch.tensor(len(labels)))).double()

    def values(self, sums: list[float]) -> dict[str, float]:
        right, nats, n = sums
        return {"accuracy": right / n, "cross_entropy": nats / n}

    def flops(self, model: nn.Module, k: int | list[int] | None) -> dict[str, int]:
        batch = torch.empty(self.config.batch_size, 2), torch.empty(self.config.batch_size, dtype=torch.int64)
        return count_flops(self.config, model, batch, batch, k)


def toy_config(run_dir: object, method: str = "smoe_dropout", **fields: object) -> ToyConfig:
    """A run of a second."""
    sizes = {"num_layers": 2, "d_model": 8, "d_hidden": 16, "num_experts": 4, "sweep": (1, 4), "progress": False}
    sizes |= {"steps": 12, "batch_size": 20, "eval_interval": 4, "log_interval": 1, "learning_rate": 0.02}
    return ToyConfig(method, str(run_dir), **{**sizes, "precision": "fp32", "scale_reason": "a test", **fields})


def toy(config: ToyConfig) -> tuple[Toy, Processes]:
    """The task and its only process."""
    processes = Processes()
    processes.configure(config)
    return Toy(config, 0, 1), processes


def main() -> None:
    run_training(Toy, prog="toy")
