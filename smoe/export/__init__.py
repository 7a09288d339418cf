"""Models with SMoE layers -> formats that other software reads, and weights in int8.

``targets`` says which architecture a model becomes, and refuses what it cannot say; ``hf`` writes the folder; ``card``
writes its README.md. ``int8`` has torchao quantise a model, experts included.
"""

from .hf import to_hf
from .int8 import to_int8

__all__ = ["to_hf", "to_int8"]
