#!/usr/bin/env bash
# Figure 5 (b), Transformer-XL on enwik8: learnable SMoE, 2 experts as wide as those of a model with 16.
# Flags are those of python -m transformer_xl.train: --scale NAME (default: paper on a GPU, else cpu), --seed N, ...
exec bash "$(dirname "$0")/../transformer_xl.sh" figure5/2experts_smoe \
    --method smoe --num_experts 2 --d_hidden_share 0.125 "$@"
