"""Empty: it only has to be found, as a module in Python and not as a CUDA extension."""
