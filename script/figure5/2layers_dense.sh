#!/usr/bin/env bash
# Figure 5 (a), Transformer-XL on enwik8: dense with dropout, 2 layers.
# Flags are those of python -m transformer_xl.train: --scale NAME (default: paper on a GPU, else cpu), --seed N, ...
exec bash "$(dirname "$0")/../transformer_xl.sh" figure5/2layers_dense --method dense_dropout --num_layers 2 "$@"
