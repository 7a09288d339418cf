#!/usr/bin/env bash
# Table 2, Transformer-XL on SST-2: dense with dropout.
#
#   bash script/table2/sst2/dense_model.sh [pretrained run] [flags of python -m transformer_xl.classify]
#
# Without a pretrained run it starts from that of script/table1/directly_dense_training.sh.
exec bash "$(dirname "$0")/../../sst2.sh" table2/sst2/dense_model directly_dense_training "$@"
