#!/usr/bin/env bash
# Table 2, BERT on ASDiv-A: SMoE-Dropout, with all experts activated throughout.
#
#   bash script/table2/asdiv_a/bert/smoe_dropout.sh [pretrained run] [flags]
#
# Without a pretrained run it starts from that of script/table1/bert/smoe_dropout.sh.
# --keep 8: half of the experts, which the training data vote for. script/table2.sh lists the flags.
exec bash "$(dirname "$0")/../../../table2.sh" asdiv_a bert smoe_dropout "$@"
