"""Only to be found: a module in Python, not a CUDA extension."""
