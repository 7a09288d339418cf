#!/usr/bin/env bash
# Table 2, BERT on CSQA: THOR, with all experts activated throughout.
#
#   bash script/table2/csqa/bert/thor.sh [pretrained run] [flags]
#
# Without a pretrained run it starts from that of script/table1/bert/thor.sh.
# --keep 8: half of the experts, which the training data vote for. script/table2.sh lists the flags.
exec bash "$(dirname "$0")/../../../table2.sh" csqa bert thor "$@"
