#!/usr/bin/env bash
# A pretrained encoder adapted to text without labels: SMoE-Dropout (16 experts, fixed random router, k grows from 8 to 16).
#
#   bash script/pretrained/smoe_dropout.sh --start_from FOLDER [--source FILE|FOLDER ...] [flags]
#
# script/pretrained.sh tells the rest. bash script/pretrained/sst2/smoe_dropout.sh RUN fine-tunes what comes out.
exec bash "$(dirname "$0")/../pretrained.sh" smoe_dropout "$@"
