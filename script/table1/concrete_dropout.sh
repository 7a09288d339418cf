#!/usr/bin/env bash
# Table 1, Transformer-XL on enwik8: densely training with Concrete Dropout.
# Flags are those of python -m transformer_xl.train: --scale paper|hour|cpu|smoke (default: paper on a GPU, else cpu),
# --seed N, ...
exec bash "$(dirname "$0")/../transformer_xl.sh" table1/concrete_dropout --method dense_concrete_dropout "$@"
