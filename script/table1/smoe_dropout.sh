#!/usr/bin/env bash
# Table 1, Transformer-XL on enwik8: SMoE-Dropout (fixed random router, k grows from N/2 to N).
# Flags are those of python -m transformer_xl.train: --scale paper|hour|cpu|smoke (default: paper on a GPU, else cpu),
# --seed N, ...
exec bash "$(dirname "$0")/../transformer_xl.sh" table1/smoe_dropout --method smoe_dropout "$@"
