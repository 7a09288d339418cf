#!/usr/bin/env bash
# All runs of a pretrained encoder, which runs.yaml beside this lists:
#
#   bash script/pretrained/all.sh --start_from FOLDER --text TEXT --panel sst2 --seeds 1 2 3
#
# FOLDER is an encoder as Hugging Face stores it, TEXT what it is adapted to first: docs/pretrained.md. Finished runs are
# skipped, what was cut off goes on. --dry_run says what there is to do; --help lists the other flags.
exec bash "$(dirname "$0")/../panel.sh" pretrained "$@"
