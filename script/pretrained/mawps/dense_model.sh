#!/usr/bin/env bash
# MAWPS with a pretrained encoder: dense model.
#
#   bash script/pretrained/mawps/dense_model.sh --start_from FOLDER [--text FILE|FOLDER] [flags of python -m bert.math_word_problems]
#   bash script/pretrained/mawps/dense_model.sh RUN [flags]
#
# RUN is what script/pretrained/dense_model.sh left; with --start_from it is trained first. script/table2.sh lists the flags.
exec bash "$(dirname "$0")/../../table2.sh" mawps pretrained dense_model "$@"
