#!/usr/bin/env bash
# Section A2.2, Transformer-XL on enwik8: learnable SMoE with k growing from 8 to 16, as in SMoE-Dropout.
# Flags are those of python -m transformer_xl.train: --scale NAME (default: paper on a GPU, else cpu), --seed N, ...
exec bash "$(dirname "$0")/../transformer_xl.sh" figure5/growing_k_smoe \
    --method smoe --schedule linear --k_min 8 --k_max 16 "$@"
