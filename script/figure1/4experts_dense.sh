#!/usr/bin/env bash
# Figures 1, 3 and 5 (b), Transformer-XL on enwik8: dense with dropout, as wide as 4 of the 16 experts.
# Flags are those of python -m transformer_xl.train: --scale NAME (default: paper on a GPU, else cpu), --seed N, ...
exec bash "$(dirname "$0")/../transformer_xl.sh" figure1/4experts_dense \
    --method dense_dropout --d_hidden_share 0.25 "$@"
