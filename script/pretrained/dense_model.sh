#!/usr/bin/env bash
# A pretrained encoder adapted to text without labels: the dense model, with the same steps.
#
#   bash script/pretrained/dense_model.sh --start_from FOLDER [--source FILE|FOLDER ...] [flags]
#
# script/pretrained.sh tells the rest. bash script/pretrained/sst2/dense_model.sh RUN fine-tunes what comes out.
exec bash "$(dirname "$0")/../pretrained.sh" dense_model "$@"
