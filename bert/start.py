"""A BERT or RoBERTa of a Hugging Face folder as the start of a training, its MLPs cut into experts."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel

import smoe
from bert.hf_config import SIZES, read_config
from bert.model import with_positions
from smoe import SMoE
from smoe.cut import split
from smoe.errors import one_line

# What all of our models have alike, see bert/model.py.
_ALIKE = ("hidden_act", "layer_norm_eps", "pad_token_id", "type_vocab_size")


def start_from(folder: str, model: PreTrainedModel, tokenizer: Path) -> dict[str, str]:
    """Gives ``model``, as ``build_model`` makes it, the weights of ``folder``; returns what a record says of them.

    Each MLP is cut: expert e gets the hidden units e * h to (e + 1) * h - 1. So with ``score="sum"`` and all experts
    activated the model computes what that of the folder does. What the folder lacks, such as the head of a sentence
    encoder, stays as it was drawn. With fewer or more positions the learned ones are cut or repeated.

    Args:
        tokenizer: the tokenizer.json of the data.

    Raises:
        ValueError: the folder is damaged, or of a model that is built otherwise, or has another vocabulary.
    """
    config = read_config(folder)
    for name in ("model_type", "vocab_size", *SIZES.values(), *_ALIKE):
        theirs, ours = getattr(config, name, None), getattr(model.config, name)
        if theirs != ours:
            raise ValueError(f"start_from: {folder} has {name} = {theirs!r}; it must be {ours!r}, as this training has")
    if vocabulary_of(folder) != Tokenizer.from_file(str(tokenizer)).get_vocab():
        advice = "prepare the data with data/bookcorpus/prepare.py --tokenizer FOLDER"
        raise ValueError(f"start_from: {folder} has another vocabulary than the data; {advice}")
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the parts that stay as they were drawn
        source = AutoModelForMaskedLM.from_config(config)
        untouched = {name: value.clone() for name, value in source.state_dict().items()}
        try:
            smoe.from_pretrained(folder, model=source)
        except ValueError as error:
            raise ValueError(f"start_from: {one_line(error)}") from None
    if smoe.smoe_layers(source):
        raise ValueError(f"start_from: {folder} has SMoE layers; it must be a dense model")
    _copy(source, model, untouched)
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")):
        digest.update(file.read_bytes())
    return {"model_type": config.model_type, "sha256": digest.hexdigest()}


def vocabulary_of(folder: str) -> dict[str, int]:
    """Token -> id. Raises ValueError when ``folder`` has no tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_vocab()
    except Exception as error:  # whatever the library makes of a missing or damaged file
        raise ValueError(f"start_from: the tokenizer of {folder} can't be read: {one_line(error)}") from None


@torch.no_grad()
def _copy(source: PreTrainedModel, model: PreTrainedModel, untouched: dict[str, torch.Tensor]) -> None:
    for theirs, ours in zip(source.base_model.encoder.layer, model.base_model.encoder.layer, strict=True):
        up, down, mlp = theirs.intermediate.dense, theirs.output.dense, ours.intermediate
        if isinstance(mlp, SMoE):
            dense = {"up_weight": up.weight, "up_bias": up.bias, "down_weight": down.weight, "down_bias": down.bias}
            split(mlp.experts, dense)
        else:
            mlp.up.load_state_dict(up.state_dict())
            mlp.down.load_state_dict(down.state_dict())
    given = source.state_dict()
    for name, parameter in model.named_parameters():
        if name not in given or torch.equal(given[name], untouched[name]):
            continue
        value = given[name]
        if name.endswith("position_embeddings.weight"):
            reserved = 0 if model.config.model_type == "bert" else model.config.pad_token_id + 1
            value = with_positions(value, len(parameter) - reserved, reserved)
        parameter.copy_(value)
