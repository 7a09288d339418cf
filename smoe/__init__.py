"""Sparse mixtures of experts as a training technique: SMoE-Dropout on torch alone."""

from .budget import fit_budget
from .control import activated, get_top_k, record_routing, set_top_k, smoe_layers
from .cut import merge, split
from .dense_dropout import ConcreteDropout, DropBlock
from .experts import Experts
from .layer import SMoE
from .methods import METHODS, DenseMLP, Method, get_method
from .modulize import demodulize, modulize
from .modulize.load import from_pretrained
from .modulize.register import register_mlp
from .modulize.save import save_pretrained
from .modulize.summary import summary
from .parameters import parameter_groups
from .router import HashRouter, LearnedRouter, RandomRouter, Router, Routing, UniformRouter, balance_loss
from .schedule import k_at, ks_at
from .slim import slim, vote

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "ConcreteDropout",
    "DenseMLP",
    "DropBlock",
    "Experts",
    "HashRouter",
    "LearnedRouter",
    "Method",
    "RandomRouter",
    "Router",
    "Routing",
    "SMoE",
    "UniformRouter",
    "activated",
    "balance_loss",
    "demodulize",
    "fit_budget",
    "from_pretrained",
    "get_method",
    "get_top_k",
    "k_at",
    "ks_at",
    "merge",
    "modulize",
    "parameter_groups",
    "record_routing",
    "register_mlp",
    "save_pretrained",
    "set_top_k",
    "slim",
    "smoe_layers",
    "split",
    "summary",
    "vote",
]
