"""Transformer-XL (Dai et al. 2019) with an exchangeable MLP: model, data, training and evaluation."""

from transformer_xl.model import TransformerXL, TransformerXLConfig, TransformerXLOutput

__all__ = ["TransformerXL", "TransformerXLConfig", "TransformerXLOutput"]
