#!/usr/bin/env bash
# Beyond the paper, Transformer-XL on enwik8: SMoE-Dropout, k drawn from 1..16 at every step for each layer.
# Flags are those of python -m transformer_xl.train: --scale NAME (default: paper on a GPU, else cpu), --seed N, ...
exec bash "$(dirname "$0")/../transformer_xl.sh" figure5/random_k_per_layer_smoe_dropout \
    --method smoe_dropout --schedule random_per_layer --k_min 1 "$@"
