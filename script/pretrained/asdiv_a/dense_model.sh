#!/usr/bin/env bash
# ASDiv-A with a pretrained encoder: dense model.
#
#   bash script/pretrained/asdiv_a/dense_model.sh --start_from FOLDER [--text FILE|FOLDER] [flags of python -m bert.math_word_problems]
#   bash script/pretrained/asdiv_a/dense_model.sh RUN [flags]
#
# RUN is what script/pretrained/dense_model.sh left; with --start_from it is trained first. script/table2.sh lists the flags.
exec bash "$(dirname "$0")/../../table2.sh" asdiv_a pretrained dense_model "$@"
