#!/usr/bin/env bash
# Table 2, Transformer-XL on SST-2: dense with dropout.
#
#   bash script/table2/sst2/dense_model.sh [pretrained run] [flags]
#
# Without a pretrained run it starts from that of script/table1/directly_dense_training.sh.
# script/table2.sh lists the flags.
exec bash "$(dirname "$0")/../../table2.sh" sst2 transformer_xl dense_model "$@"
