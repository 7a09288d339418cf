#!/usr/bin/env bash
# SST-2 with a pretrained encoder: dense model.
#
#   bash script/pretrained/sst2/dense_model.sh --start_from FOLDER [--text FILE|FOLDER] [flags of python -m bert.classify]
#   bash script/pretrained/sst2/dense_model.sh RUN [flags]
#
# RUN is what script/pretrained/dense_model.sh left; with --start_from it is trained first. script/table2.sh lists the flags.
exec bash "$(dirname "$0")/../../table2.sh" sst2 pretrained dense_model "$@"
