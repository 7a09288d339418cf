#!/usr/bin/env bash
# Table 2, RoBERTa on SVAMP: dense with dropout.
#
#   bash script/table2/svamp/roberta/dense_model.sh [pretrained run] [flags]
#
# Without a pretrained run it starts from that of script/table1/roberta/directly_dense_training.sh.
# script/table2.sh lists the flags.
exec bash "$(dirname "$0")/../../../table2.sh" svamp roberta dense_model "$@"
