#!/usr/bin/env bash
# All runs of Table 3, which runs.yaml beside this lists: bash script/table3/all.sh --scale cpu --seeds 1 2 3
# Teachers that are missing are trained first. Finished ones are skipped, what was cut off goes on. --dry_run says what
# there is to do; --help lists the other flags.
exec bash "$(dirname "$0")/../panel.sh" table3 "$@"
