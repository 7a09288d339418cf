#!/usr/bin/env bash
# Figure 5 (d), Transformer-XL on enwik8: SMoE-Dropout without growing k: always 2 of 16 experts.
# The paper does not say which k it keeps; 2 is that of learnable SMoE and THOR.
# Flags are those of python -m transformer_xl.train: --scale NAME (default: paper on a GPU, else cpu), --seed N, ...
exec bash "$(dirname "$0")/../transformer_xl.sh" figure5/constant_k2_smoe_dropout \
    --method smoe_dropout --schedule constant --k_max 2 "$@"
