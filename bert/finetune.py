"""BERT or RoBERTa as the encoder of a task with examples: from a run of ``bert.pretrain``, or from scratch.

``classify.py``, ``multiple_choice.py``, ``math_word_problems.py`` and ``question_answering.py`` beside this are such
tasks. The text is cut into tokens by the tokenizer of the pretrained run, which is copied into the run folder. Nothing
is cut off: an example that is longer than ``seq_len`` is an error. Where that is more than the positions of the
pretrained run, its position embeddings are repeated, and go on learning (Beltagy et al. 2020, section 5).
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from bert.config import PretrainConfig, RunConfig
from bert.data import Vocabulary
from bert.model import build_model, with_positions
from smoe.options import option
from smoe.train.examples import hold_out
from smoe.train.finetune import FineTuned, FineTuneTask, pretrained_record
from smoe.train.folder import RunFolder
from smoe.train.predictions import Predictions
from smoe.train.processes import Processes
from smoe.train.resume import read_config
from smoe.train.sentence_floors import floor_notes
from smoe.train.task import equal_share

TOKENIZER = "tokenizer.json"
_SPECIAL = {
    "bert": {"pad": "[PAD]", "mask": "[MASK]", "start": "[CLS]", "end": "[SEP]", "unknown": "[UNK]"},
    "roberta": {"pad": "<pad>", "mask": "<mask>", "start": "<s>", "end": "</s>", "unknown": "<unk>"},
}


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig(FineTuned, RunConfig):
    """One run of a BERT or RoBERTa that learns from examples."""

    of_the_run: ClassVar[tuple[str, ...]] = ("model", *FineTuned.of_the_run)

    tokenizer: str | None = option(None, "a tokenizer.json; null: that of the pretrained run")
    seq_len: int = option(512, "the most tokens of an example; a longer one is an error", at_least=8)
    valid_share: float = option(
        0.1, "share of the training examples that is kept apart to choose the best checkpoint by", above=0, below=1
    )

    @classmethod
    def inherited(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        values = super().inherited(given)
        if given.get("run") is not None and "model" not in values:
            raise ValueError(f"run: {given['run']} is not of a BERT or RoBERTa, as python -m bert.pretrain leaves it")
        return values

    def tokenizer_file(self) -> Path:
        """The file that was named, that of the pretrained run, or the run folder's own (a run that is evaluated)."""
        if self.tokenizer is not None:
            return Path(self.tokenizer)
        return RunFolder(self.run or self.run_dir).path / TOKENIZER


class FineTuning(FineTuneTask):
    """What these tasks share. What an example is, is up to the task."""

    config: FineTuneConfig

    def __init__(self, config: FineTuneConfig, rank: int, world_size: int) -> None:
        super().__init__(config, rank, world_size)
        self.architecture = self.title = config.model
        self.tokenizer, self.vocabulary = read_tokenizer(config)
        self.predictions = Predictions()
        self.facts = {"vocabulary": dataclasses.asdict(self.vocabulary)}
        self.data = self.read_data()
        train = self.data["train"]
        for split, examples in self.data.items():
            longest = max(max(self.lengths(example)) for example in examples)
            if longest > config.seq_len:
                allowed = f"at least {longest}, the tokens of the longest example of {split}"
                raise ValueError(f"seq_len is {config.seq_len}; it must be {allowed}")
        if config.batch_size > len(train):
            raise ValueError(
                f"batch_size is {config.batch_size}; it must be at most the {len(train)} training examples"
            )
        self.share, self.dealer = equal_share(config.batch_size, rank, world_size), self.deal(train)
        tokens = sum(sum(self.lengths(example)) for example in train)
        self.tokens_per_step = round(config.batch_size * tokens / len(train))
        torch.manual_seed(config.seed)
        self.model = self.build_model()
        self.blocks = self.model.encoder.encoder.layer
        self.load_pretrained()

    @abstractmethod
    def read_data(self) -> dict[str, Sequence[Any]]:
        """The examples of train and of every split; sets ``dataset``, and adds to ``facts`` and ``record``."""

    @abstractmethod
    def lengths(self, example: Any) -> list[int]:
        """The tokens of each sequence that an example has."""

    @abstractmethod
    def collate(self, examples: Sequence[Any]) -> tuple[Tensor, ...]:
        """What the model is called with for these examples."""

    def load_run(self) -> dict[str, Any]:
        return load_encoder(self.model.encoder, self.config, self.vocabulary)

    def token_mask(self, batch: tuple[Tensor, ...]) -> Tensor:
        rows = batch[0].flatten(0, -2)
        return rows != self.vocabulary.pad

    def batch(self, step: int) -> tuple[Tensor, ...]:
        return self.collate([self.data["train"][i] for i in self.dealer.batch(step)[self.share]])

    def padded(self, example: Any) -> int:
        return max(self.lengths(example))

    def forward(self, model: nn.Module, batch: tuple[Tensor, ...], device: torch.device) -> Any:
        return model(*(part.to(device) for part in batch))

    def files(self) -> list[Path]:
        own = self.config.run is None and self.config.tokenizer is None
        return [] if own else [self.config.tokenizer_file()]

    def result_files(self, processes: Processes) -> dict[str, str]:
        return self.predictions.files(self.config.sweep_ks(), processes)

    def notes(self) -> list[str]:
        sizes = ", ".join(f"{split} {len(examples)}" for split, examples in self.data.items())
        return [f"data: {self.dataset['name']}, {sizes}", *floor_notes(self.record, self.reported_split())]


def read_tokenizer(config: FineTuneConfig) -> tuple[Tokenizer, Vocabulary]:
    """The tokenizer of ``config`` and what a model must know of it. Raises ValueError for one that can't be used."""
    file = config.tokenizer_file()
    if not file.is_file():
        if config.run is None and config.tokenizer is None:
            raise ValueError(
                "tokenizer: missing; name a pretrained run with --run, or a tokenizer.json with --tokenizer"
            )
        raise ValueError(f"tokenizer: there is no file {file}; a run of bert.pretrain has a {TOKENIZER}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception for a damaged file
        raise ValueError(f"tokenizer: {file} can't be read: {' '.join(str(error).split())}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = {role: tokenizer.token_to_id(token) for role, token in _SPECIAL[config.model].items()}
    for role in (role for role, number in ids.items() if number is None):
        raise ValueError(f"tokenizer: {file} has no {_SPECIAL[config.model][role]}, which {config.model} needs")
    return tokenizer, Vocabulary(tokenizer.get_vocab_size(), **ids)


def build_encoder(config: FineTuneConfig, vocabulary: Vocabulary) -> PreTrainedModel:
    """A fresh encoder with the MLPs of the method: (B, T) ids -> ``last_hidden_state`` (B, T, d_model)."""
    return build_model(config, vocabulary).base_model


def encode(encoder: PreTrainedModel, input_ids: Tensor, **inputs: Tensor) -> Tensor:
    """(B, T, d_model) of (B, T) ids, padded at the end; nobody attends to the padding."""
    # A mask of four dimensions is taken as it is. From one of two Transformers would make it, after a look at what is
    # in it, which FLOPs counted from shapes alone can't give.
    there = (input_ids != encoder.config.pad_token_id)[:, None, None, :]
    return encoder(input_ids=input_ids, attention_mask=there, **inputs).last_hidden_state


def load_encoder(encoder: PreTrainedModel, config: FineTuneConfig, vocabulary: Vocabulary) -> dict[str, Any]:
    """Gives ``encoder`` the weights of the pretrained run; returns what a record says of that.

    Raises ValueError when the run is not of this model, method and vocabulary.
    """
    pretrained, checkpoint = config.read_pretrained(PretrainConfig, "a BERT or RoBERTa")
    if Vocabulary(**checkpoint.state["facts"]["vocabulary"]) != vocabulary:
        raise ValueError(f"tokenizer: {config.tokenizer_file()} has another vocabulary than the run {config.run}")
    prefix = f"{config.model}."
    whole = checkpoint.tensors["model"]
    weights = {name.removeprefix(prefix): tensor for name, tensor in whole.items() if name.startswith(prefix)}
    name = "embeddings.position_embeddings.weight"
    # RoBERTa counts positions from the padding's id + 1.
    weights[name] = with_positions(weights[name], config.seq_len, 0 if config.model == "bert" else vocabulary.pad + 1)
    encoder.load_state_dict(weights)
    record = pretrained_record(pretrained, checkpoint) | {"seq_len": pretrained.seq_len}
    folder = read_config(config.run).get("start_from")
    return record | ({} if folder is None else {"start_from": Path(folder).name})


def pad_ids(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    """(B, longest) int64 of rows of ids, filled up with ``pad``."""
    ids = np.full((len(rows), max(map(len, rows))), pad, dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return torch.from_numpy(ids)


def split_off_valid(train: Sequence[Any], config: FineTuneConfig, key: Any) -> dict[str, list[Any]]:
    """``train`` and ``valid`` out of the training examples, see :func:`smoe.train.examples.hold_out`."""
    rest, held = hold_out(train, config.valid_share, key)
    return {"train": rest, "valid": held}
