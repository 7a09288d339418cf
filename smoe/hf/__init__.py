"""Hugging Face: k, logs and balance losses during ``transformers.Trainer``; saving and loading.

After ``import smoe.hf`` Transformers' own ``from_pretrained`` loads modulized models (``AutoModel...``, pipelines, and
whatever else calls it). Without it, and before version 5 of Transformers, they are refused there.
"""

from __future__ import annotations

from transformers import __version__

from ..modulize.hook import record_when_saving
from ..modulize.load import from_pretrained
from ..modulize.save import save_pretrained
from .balance import BalanceLoss
from .top_k import TopKCallback

__all__ = ["BalanceLoss", "TopKCallback", "from_pretrained", "save_pretrained"]

record_when_saving()
if int(__version__.partition(".")[0]) >= 5:  # earlier versions would round the routers to the dtype of the model
    from ..modulize import auto  # noqa: F401 (registers with Transformers)
