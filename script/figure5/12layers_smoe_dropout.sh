#!/usr/bin/env bash
# Figure 5 (a), Transformer-XL on enwik8: SMoE-Dropout, 12 layers.
# Flags are those of python -m transformer_xl.train: --scale NAME (default: paper on a GPU, else cpu), --seed N, ...
exec bash "$(dirname "$0")/../transformer_xl.sh" figure5/12layers_smoe_dropout \
    --method smoe_dropout --num_layers 12 "$@"
