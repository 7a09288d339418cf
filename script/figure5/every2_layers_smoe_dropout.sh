#!/usr/bin/env bash
# Figure 5 (e), Transformer-XL on enwik8: SMoE-Dropout with experts in every second layer.
# Flags are those of python -m transformer_xl.train: --scale NAME (default: paper on a GPU, else cpu), --seed N, ...
exec bash "$(dirname "$0")/../transformer_xl.sh" figure5/every2_layers_smoe_dropout \
    --method smoe_dropout --layers every-2 "$@"
