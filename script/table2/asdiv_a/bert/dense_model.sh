#!/usr/bin/env bash
# Table 2, BERT on ASDiv-A: dense with dropout.
#
#   bash script/table2/asdiv_a/bert/dense_model.sh [pretrained run] [flags]
#
# Without a pretrained run it starts from that of script/table1/bert/directly_dense_training.sh.
# script/table2.sh lists the flags.
exec bash "$(dirname "$0")/../../../table2.sh" asdiv_a bert dense_model "$@"
