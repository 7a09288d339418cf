"""Any model's MLPs become SMoE layers, in place, and back.

``find`` looks for the MLPs and ``trial`` runs a module to learn what its MLP computes. ``layers`` chooses among them,
``swap`` exchanges linear layers for an SMoE layer, ``convert`` does all of it to a model. ``record`` describes what was
done, ``save`` writes and reads folders.
"""

from .convert import demodulize, modulize

__all__ = ["demodulize", "modulize"]
