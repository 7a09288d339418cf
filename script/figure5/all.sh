#!/usr/bin/env bash
# All runs of Figure 5, which runs.yaml beside this lists: bash script/figure5/all.sh --scale cpu --seeds 1 2 3
# Finished ones are skipped, what was cut off goes on. --dry_run says what there is to do; --help lists the other flags.
exec bash "$(dirname "$0")/../panel.sh" figure5 "$@"
