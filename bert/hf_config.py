"""What the config.json of a Hugging Face BERT or RoBERTa says of its sizes."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from smoe.errors import one_line

# Field of a training -> field of Hugging Face's config: what the weights decide.
SIZES = {
    "num_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "d_hidden": "intermediate_size",
}


def read_config(folder: str) -> PretrainedConfig:
    """Hugging Face's config of ``folder``. Raises ValueError unless it is a BERT's or a RoBERTa's."""
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"start_from: {folder} has no config.json; it must be a Hugging Face folder")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the library makes of a damaged file
        raise ValueError(f"start_from: {folder}/config.json can't be read: {one_line(error)}") from None
    if config.model_type not in ("bert", "roberta"):
        raise ValueError(f"start_from: {folder} is a {config.model_type}; it must be a bert or a roberta")
    return config
