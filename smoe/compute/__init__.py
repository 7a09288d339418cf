"""How the experts are computed: one signature, ``compute(x (T, d), experts, routing) -> y (T, d)``, one file a path."""

from .choose import PATHS, ComputePath, check_compute, choose

__all__ = ["PATHS", "ComputePath", "check_compute", "choose"]
