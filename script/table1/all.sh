#!/usr/bin/env bash
# All runs of Table 1, which runs.yaml beside this lists:
# bash script/table1/all.sh --panel transformer_xl --scale cpu --seeds 1 2 3
# bash script/table1/all.sh --panel bert roberta --scale cpu [--source FOLDER]
# Finished ones are skipped, what was cut off goes on. --dry_run says what there is to do; --help lists the other flags.
exec bash "$(dirname "$0")/../panel.sh" table1 "$@"
