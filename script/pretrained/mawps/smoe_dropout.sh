#!/usr/bin/env bash
# MAWPS with a pretrained encoder: SMoE-Dropout.
#
#   bash script/pretrained/mawps/smoe_dropout.sh --start_from FOLDER [--text FILE|FOLDER] [flags of python -m bert.math_word_problems]
#   bash script/pretrained/mawps/smoe_dropout.sh RUN [flags]
#
# RUN is what script/pretrained/smoe_dropout.sh left; with --start_from it is trained first. script/table2.sh lists the flags.
exec bash "$(dirname "$0")/../../table2.sh" mawps pretrained smoe_dropout "$@"
