"""Faults that trainings must survive. `python -m tests.faults` runs the long drill, test_faults.py a part of it."""
