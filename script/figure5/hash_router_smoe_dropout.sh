#!/usr/bin/env bash
# Figure 5 (c), Transformer-XL on enwik8: SMoE-Dropout with experts that a fixed random table gives each byte.
# Flags are those of python -m transformer_xl.train: --scale NAME (default: paper on a GPU, else cpu), --seed N, ...
exec bash "$(dirname "$0")/../transformer_xl.sh" figure5/hash_router_smoe_dropout \
    --method smoe_dropout --router hash "$@"
