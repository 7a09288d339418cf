#!/usr/bin/env bash
# Beyond the paper, Transformer-XL on enwik8: learnable SMoE, k drawn from 1..16 at every step, the same for all layers.
# Flags are those of python -m transformer_xl.train: --scale NAME (default: paper on a GPU, else cpu), --seed N, ...
exec bash "$(dirname "$0")/../transformer_xl.sh" figure5/random_k_smoe \
    --method smoe --schedule random --k_min 1 --k_max 16 "$@"
