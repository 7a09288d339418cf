#!/usr/bin/env bash
# Figure 5 (b), Transformer-XL on enwik8: SMoE-Dropout, 8 experts as wide as those of a model with 16.
# Flags are those of python -m transformer_xl.train: --scale NAME (default: paper on a GPU, else cpu), --seed N, ...
exec bash "$(dirname "$0")/../transformer_xl.sh" figure5/8experts_smoe_dropout \
    --method smoe_dropout --num_experts 8 --d_hidden_share 0.5 "$@"
