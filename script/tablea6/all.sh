#!/usr/bin/env bash
# All runs of Table A6, which runs.yaml beside this lists: bash script/tablea6/all.sh --scale cpu --seeds 1 2 3
# Pretrained runs that are missing are trained first. Finished ones are skipped, what was cut off goes on. --dry_run says
# what there is to do; --help lists the other flags.
exec bash "$(dirname "$0")/../panel.sh" tablea6 "$@"
