"""Models with SMoE layers -> formats that other software reads.

``targets`` says which architecture a model becomes, and refuses what it cannot say; ``hf`` writes the folder; ``card``
writes its README.md.
"""

from .hf import to_hf

__all__ = ["to_hf"]
