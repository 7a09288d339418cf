#!/usr/bin/env bash
# CSQA with a pretrained encoder: SMoE-Dropout.
#
#   bash script/pretrained/csqa/smoe_dropout.sh --start_from FOLDER [--text FILE|FOLDER] [flags of python -m bert.multiple_choice]
#   bash script/pretrained/csqa/smoe_dropout.sh RUN [flags]
#
# RUN is what script/pretrained/smoe_dropout.sh left; with --start_from it is trained first. script/table2.sh lists the flags.
exec bash "$(dirname "$0")/../../table2.sh" csqa pretrained smoe_dropout "$@"
