#!/usr/bin/env bash
# Table A5, Transformer-XL on SST-2: learnable SMoE that was pretrained with growing k, all experts activated throughout.
#
#   bash script/tablea5/growing_k_smoe.sh [pretrained run] [flags]
#
# Without a pretrained run it starts from that of script/figure5/growing_k_smoe.sh.
# --keep 8: half of the experts, which the training data vote for. script/table2.sh lists the flags.
exec bash "$(dirname "$0")/../table2.sh" sst2 transformer_xl growing_k_smoe "$@"
