#!/usr/bin/env bash
# Table 2, RoBERTa on ASDiv-A: THOR, with all experts activated throughout.
#
#   bash script/table2/asdiv_a/roberta/thor.sh [pretrained run] [flags]
#
# Without a pretrained run it starts from that of script/table1/roberta/thor.sh.
# --keep 8: half of the experts, which the training data vote for. script/table2.sh lists the flags.
exec bash "$(dirname "$0")/../../../table2.sh" asdiv_a roberta thor "$@"
