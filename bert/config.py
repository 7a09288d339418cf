"""What a training of BERT or RoBERTa can be told, beside what ``smoe.train.config`` has for every training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from bert.hf_config import SIZES, read_config
from smoe.methods import get_method
from smoe.options import option, required
from smoe.router import CLASSES
from smoe.train.config import TrainConfig
from smoe.train.learning_rate import Decay

# Token ids don't reach the MLPs of a Hugging Face model.
_ROUTERS = tuple(name for name, router in CLASSES.items() if not router.needs_token_ids)


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrainConfig):
    """Any task with a BERT or RoBERTa."""

    model: Literal["bert", "roberta"] = required("bert or roberta")

    num_layers: int = 12
    d_model: int = 768
    num_heads: int = 12
    d_hidden: int | None = option(None, "width of the MLP; null: d_hidden_bert or d_hidden_roberta")
    d_hidden_bert: int = option(6144, "width of BERT's MLP")
    d_hidden_roberta: int = option(3072, "width of RoBERTa's MLP")
    init_std: float = option(0.02, "standard deviation of the weights that training starts from", above=0)
    position_init: Literal["normal", "sinusoid"] = option("normal", "what learned positions start as")
    key_init: Literal["normal", "query"] = option("normal", "what keys start as; query: the weights of the queries")
    attention_dropout: float = 0.1
    router: Literal[_ROUTERS] | None = None

    steps: int = 100_000
    batch_size: int = 64
    seq_len: int = option(512, "tokens of a sequence: best the data's block_length, else it must divide it", at_least=8)
    learning_rate: float = 5e-5
    decay: Decay = "linear"
    clip: float = 1.0

    eval_interval: int = 5000
    eval_batch_size: int = 8
    log_interval: int = 100

    def __post_init__(self) -> None:
        if self.d_hidden is None:
            object.__setattr__(self, "d_hidden", self.d_hidden_bert if self.model == "bert" else self.d_hidden_roberta)
        super().__post_init__()
        if self.d_model % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}; it must divide d_model = {self.d_model}")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """One pretraining run of a BERT or RoBERTa."""

    scales_file: ClassVar[Path] = Path(__file__).parent / "configs" / "masked_lm.yaml"

    data: str | None = option(None, "a folder of data/bookcorpus/prepare.py; null: data/bookcorpus/MODEL-SCALE")
    mask_share: float = option(0.15, "share of the tokens to predict", above=0, below=1)
    eval_sequences: int | None = option(None, "sequences of valid and of test to evaluate on; null: all", at_least=1)
    start_from: str | None = option(None, "a Hugging Face folder whose weights training starts from; null: random ones")

    @classmethod
    def inherited(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The sizes of ``start_from``; experts that all count, so that all of them together are its MLP."""
        if given.get("start_from") is None:
            return {}
        recorded = read_config(given["start_from"])
        sizes = {name: getattr(recorded, theirs) for name, theirs in SIZES.items()}
        routed = get_method(given["method"]).routed if "method" in given else False
        return {
            "model": recorded.model_type,
            "init_std": recorded.initializer_range,
            "position_init": "normal",
            "key_init": "normal",
            **({"score": "sum"} if routed else {}),
            **sizes,
        }

    def __post_init__(self) -> None:
        if self.data is None:
            object.__setattr__(self, "data", f"data/bookcorpus/{self.model}-{self.scale}")
        super().__post_init__()
