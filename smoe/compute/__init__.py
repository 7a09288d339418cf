"""How PyTorch computes the experts: one file per path, all ``compute(x (T, d), experts, routing) -> y (T, d)``.

Words:

engine     who computes the experts: PyTorch or fastmoe (``smoe.engine``; public argument ``engine``)
path       one of PyTorch's ways of doing it, a key of ``PATHS`` (public argument ``compute``)
fast path  a path with a backward of its own (``fast_path``): ``dense`` and ``grouped``
kernel     an operator of a library that does several steps at once, such as oneDNN's linear layer with ReLU
pair       a token together with one of the k experts it chose
"""

from .choose import PATHS, ComputePath, check_compute, choose

__all__ = ["PATHS", "ComputePath", "check_compute", "choose"]
