"""BERT and RoBERTa with any method of Table 1: data, pretraining and evaluation over the number of activated experts.

Nothing is imported here; import the module you need, e.g. `from bert.model import build_model`.
"""
