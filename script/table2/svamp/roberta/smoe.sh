#!/usr/bin/env bash
# Table 2, RoBERTa on SVAMP: learnable SMoE, with all experts activated throughout.
#
#   bash script/table2/svamp/roberta/smoe.sh [pretrained run] [flags]
#
# Without a pretrained run it starts from that of script/table1/roberta/smoe.sh.
# --keep 8: half of the experts, which the training data vote for. script/table2.sh lists the flags.
exec bash "$(dirname "$0")/../../../table2.sh" svamp roberta smoe "$@"
