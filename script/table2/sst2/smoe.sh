#!/usr/bin/env bash
# Table 2, Transformer-XL on SST-2: learnable SMoE, with all experts activated throughout.
#
#   bash script/table2/sst2/smoe.sh [pretrained run] [flags]
#
# Without a pretrained run it starts from that of script/table1/smoe.sh.
# --keep 8: half of the experts, which the training data vote for. script/table2.sh lists the flags.
exec bash "$(dirname "$0")/../../table2.sh" sst2 transformer_xl smoe "$@"
