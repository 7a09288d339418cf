#!/usr/bin/env bash
# SST-2 with a pretrained encoder: SMoE-Dropout.
#
#   bash script/pretrained/sst2/smoe_dropout.sh --start_from FOLDER [--text FILE|FOLDER] [flags of python -m bert.classify]
#   bash script/pretrained/sst2/smoe_dropout.sh RUN [flags]
#
# RUN is what script/pretrained/smoe_dropout.sh left; with --start_from it is trained first. script/table2.sh lists the flags.
exec bash "$(dirname "$0")/../../table2.sh" sst2 pretrained smoe_dropout "$@"
