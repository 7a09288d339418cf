# ruff: noqa: E501
"""Tiny random models of many architectures: what ``modulize`` is tested on, and the table in docs/modulize.md.

Each row: (architecture, kind, the model class, its config's settings, its number of MLPs, the form of their MLPs).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

BASE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = {**BASE, "num_key_value_heads": 1, "head_dim": 8}
BART = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "activation_dropout": 0.3,
}
T5 = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.3,
}
VIT = {**BASE, "image_size": 16, "patch_size": 8}
SPEECH = {
    **BASE,
    "conv_dim": (16, 16),
    "conv_kernel": (4, 4),
    "conv_stride": (4, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "activation_dropout": 0.3,
    "do_stable_layer_norm": False,
    "mask_time_prob": 0.0,
}
CLIP_TOWER = {k: BASE[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
CLIP = {
    "text_config": {**BASE, "num_hidden_layers": 1},
    "vision_config": {**CLIP_TOWER, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8},
    "projection_dim": 8,
}
SEPARATE = "`intermediate` and `output` modules"
FLAT = "`fc1`, `fc2` in the layer"
OWN = "an MLP module"
GATED = "gated"

# fmt: off
MODELS = [
    ("BERT", "encoder", "BertForMaskedLM", BASE, 2, SEPARATE),
    ("RoBERTa", "encoder", "RobertaForMaskedLM", BASE, 2, SEPARATE),
    ("ELECTRA", "encoder", "ElectraForMaskedLM", {**BASE, "embedding_size": 8}, 2, SEPARATE),
    ("DeBERTa", "encoder", "DebertaForMaskedLM", {**BASE, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, 2, SEPARATE),
    ("DeBERTa-v2", "encoder", "DebertaV2ForMaskedLM", {**BASE, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, 2, SEPARATE),
    ("DistilBERT", "encoder", "DistilBertForMaskedLM", {"vocab_size": 40, "dim": 16, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32}, 2, OWN),
    ("ALBERT", "encoder", "AlbertForMaskedLM", {**BASE, "embedding_size": 8, "num_hidden_layers": 3}, 1, "`ffn`, `ffn_output` in one shared layer"),
    ("MPNet", "encoder", "MPNetForMaskedLM", BASE, 2, SEPARATE),
    ("MobileBERT", "encoder", "MobileBertForMaskedLM", {**BASE, "embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2}, 4, SEPARATE),
    ("XLM", "encoder", "XLMWithLMHeadModel", {"vocab_size": 40, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32}, 2, OWN),
    ("XLNet", "encoder", "XLNetLMHeadModel", {"vocab_size": 40, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 64, "dropout": 0.3}, 2, OWN),
    ("Funnel", "encoder", "FunnelForMaskedLM", {"vocab_size": 40, "block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 64, "activation_dropout": 0.3}, 3, OWN),
    ("ModernBERT", "encoder", "ModernBertForMaskedLM", {**BASE, "cls_token_id": 1, "sep_token_id": 2, "mlp_dropout": 0.3}, 2, "gated, one fused layer"),
    ("EuroBERT", "encoder", "EuroBertForMaskedLM", LLAMA, 2, GATED),
    ("GPT-2", "decoder", "GPT2LMHeadModel", {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}, 2, "`Conv1D`"),
    ("GPT-Neo", "decoder", "GPTNeoForCausalLM", {"vocab_size": 40, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 32}, 2, OWN),
    ("GPT-J", "decoder", "GPTJForCausalLM", {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "rotary_dim": 4}, 2, OWN),
    ("GPT-NeoX", "decoder", "GPTNeoXForCausalLM", BASE, 2, OWN),
    ("BLOOM", "decoder", "BloomForCausalLM", {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 2}, 2, OWN),
    ("Falcon", "decoder", "FalconForCausalLM", {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}, 2, OWN),
    ("OPT", "decoder", "OPTForCausalLM", {**BASE, "ffn_dim": 64, "word_embed_proj_dim": 16}, 2, FLAT),
    ("Phi", "decoder", "PhiForCausalLM", BASE, 2, OWN),
    ("StarCoder2", "decoder", "Starcoder2ForCausalLM", {**LLAMA, "residual_dropout": 0.0}, 2, OWN),
    ("Llama", "decoder", "LlamaForCausalLM", LLAMA, 2, GATED),
    ("Mistral", "decoder", "MistralForCausalLM", LLAMA, 2, GATED),
    ("Qwen2", "decoder", "Qwen2ForCausalLM", LLAMA, 2, GATED),
    ("Qwen3", "decoder", "Qwen3ForCausalLM", {**LLAMA, "head_dim": 32, "num_key_value_heads": 2}, 2, GATED),
    ("Gemma", "decoder", "GemmaForCausalLM", {**LLAMA, "head_dim": 32}, 2, GATED),
    ("Gemma 2", "decoder", "Gemma2ForCausalLM", {**LLAMA, "head_dim": 32}, 2, GATED),
    ("OLMo 2", "decoder", "Olmo2ForCausalLM", LLAMA, 2, GATED),
    ("Phi-3", "decoder", "Phi3ForCausalLM", {**LLAMA, "head_dim": 8}, 2, "gated, one fused layer"),
    ("T5", "encoder-decoder", "T5ForConditionalGeneration", T5, 2, OWN),
    ("T5 v1.1", "encoder-decoder", "T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}, 2, GATED),
    ("mT5", "encoder-decoder", "MT5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}, 2, GATED),
    ("BART", "encoder-decoder", "BartForConditionalGeneration", BART, 2, FLAT),
    ("mBART", "encoder-decoder", "MBartForConditionalGeneration", BART, 2, FLAT),
    ("Pegasus", "encoder-decoder", "PegasusForConditionalGeneration", BART, 2, FLAT),
    ("Marian", "encoder-decoder", "MarianMTModel", {**BART, "forced_eos_token_id": 2}, 2, FLAT),
    ("M2M-100", "encoder-decoder", "M2M100ForConditionalGeneration", BART, 2, FLAT),
    ("LED", "encoder-decoder", "LEDForConditionalGeneration", {**BART, "attention_window": 4, "max_encoder_position_embeddings": 32, "max_decoder_position_embeddings": 32}, 2, FLAT),
    ("ViT", "vision", "ViTForImageClassification", VIT, 2, "`intermediate` and `output` modules"),
    ("DeiT", "vision", "DeiTForImageClassification", VIT, 2, SEPARATE),
    ("BEiT", "vision", "BeitForImageClassification", VIT, 2, SEPARATE),
    ("DINOv2", "vision", "Dinov2ForImageClassification", {**VIT, "mlp_ratio": 4}, 2, OWN),
    ("DINOv2 giant", "vision", "Dinov2ForImageClassification", {**VIT, "use_swiglu_ffn": True}, 2, "gated, one fused layer"),
    ("Swin", "vision", "SwinForImageClassification", {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}, 2, SEPARATE),
    ("ConvNeXt", "vision", "ConvNextForImageClassification", {"image_size": 32, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "layer_scale_init_value": 1.0}, 2, "pointwise pair in the layer"),
    ("CLIP", "vision and text", "CLIPModel", CLIP, 2, "`fc1`, `fc2` in an MLP module"),
    ("SigLIP", "vision and text", "SiglipModel", CLIP, 3, "`fc1`, `fc2` in an MLP module"),
    ("Whisper", "audio", "WhisperForConditionalGeneration", {**BART, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16, "suppress_tokens": None, "begin_suppress_tokens": None}, 2, FLAT),
    ("wav2vec 2.0", "audio", "Wav2Vec2ForCTC", SPEECH, 2, OWN),
    ("HuBERT", "audio", "HubertForCTC", SPEECH, 2, OWN),
    ("WavLM", "audio", "WavLMForCTC", SPEECH, 2, OWN),
    ("AST", "audio", "ASTForAudioClassification", {**BASE, "patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 16, "num_mel_bins": 8}, 2, SEPARATE),
]
# fmt: on


class Sentences(torch.utils.data.Dataset):
    """Random ids for ``transformers.Trainer``, the same every time."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 40, (6,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def build(model_class: str, settings: dict) -> torch.nn.Module:
    """A random model, in evaluation mode."""
    import transformers

    torch.manual_seed(0)
    cls = getattr(transformers, model_class)
    return cls(cls.config_class(**settings)).eval()


def tiny(name: str, **more: object) -> torch.nn.Module:
    """The model of the row ``name``, with ``more`` settings."""
    row = next(row for row in MODELS if row[0] == name)
    return build(row[2], {**row[3], **more})


def with_lora(
    model: torch.nn.Module, *, modules: Sequence[str] = (), parameters: Sequence[str] = ()
) -> torch.nn.Module:
    """PEFT's adapters with random factors: they change what the model computes, and all factors get gradients."""
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(
        target_modules=list(modules), target_parameters=list(parameters), r=2, init_lora_weights=False
    )
    return peft.get_peft_model(model, config)


def inputs_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What one forward pass of ``model`` takes."""
    generator = torch.Generator().manual_seed(1)
    config, main = model.config, model.main_input_name
    ids = torch.randint(3, 40, (2, 8), generator=generator)
    if main == "input_ids":
        given = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 8, [1] * 6 + [0] * 2])}
        if hasattr(config, "vision_config"):
            given["pixel_values"] = torch.randn(2, 3, 16, 16, generator=generator)
    elif main == "pixel_values":
        size = config.image_size
        given = {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}
    elif config.model_type == "whisper":
        given = {"input_features": torch.randn(2, 8, 16, generator=generator)}
    else:
        given = {"input_values": torch.randn(2, 160, generator=generator)}
        if config.model_type == "audio-spectrogram-transformer":
            given = {"input_values": torch.randn(2, 16, 8, generator=generator)}
    if config.is_encoder_decoder:
        given["decoder_input_ids"] = ids[:, :5]
    return given


def logits_of(model: torch.nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    """The first output tensor of a pass, whatever it is called."""
    output = model(**inputs)
    for name in ("logits", "logits_per_image"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return output[0]


def assert_same_model(a: torch.nn.Module, b: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """The same weights under the same names, and the same logits."""
    assert list(a.state_dict()) == list(b.state_dict())
    assert all(torch.equal(b.state_dict()[k], v) for k, v in a.state_dict().items())
    with torch.no_grad():
        assert torch.equal(logits_of(a, **inputs), logits_of(b, **inputs))


def own_model() -> torch.nn.Module:
    """An MLP alone, which is no model of Transformers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
