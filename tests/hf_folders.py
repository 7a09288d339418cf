"""Small models as Hugging Face stores them; a fixture for all tests."""

import json

import pytest
import torch


@pytest.fixture(scope="session")
def hf_folder(prepared, tmp_path_factory):
    """hf_folder(model, whole=True, positions=64, **sizes) -> a folder of a small BERT or RoBERTa, whole or without its
    head, with the vocabulary of the prepared text; and that model."""
    from tokenizers import Tokenizer
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        BertModel,
        PreTrainedTokenizerFast,
        RobertaConfig,
        RobertaForMaskedLM,
        RobertaModel,
    )

    classes = {
        "bert": (BertConfig, BertForMaskedLM, BertModel),
        "roberta": (RobertaConfig, RobertaForMaskedLM, RobertaModel),
    }

    def hf_folder(model, whole=True, positions=64, **sizes):
        torch.manual_seed(7)
        tokenizer = Tokenizer.from_file(str(prepared(model) / "tokenizer.json"))
        pad = json.loads((prepared(model) / "meta.json").read_text())["special_ids"]["pad"]
        config_class, with_head, without = classes[model]
        own = {"max_position_embeddings": positions}
        if model == "roberta":
            own = {"max_position_embeddings": positions + pad + 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
        own |= {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 96}
        config = config_class(vocab_size=tokenizer.get_vocab_size(), pad_token_id=pad, **own | sizes)
        built = (with_head if whole else without)(config)
        for parameter in built.parameters():  # biases that are not 0
            torch.nn.init.normal_(parameter, std=0.3)
        folder = tmp_path_factory.mktemp("hf_folder")
        built.save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
        return folder, built.eval()

    return hf_folder
