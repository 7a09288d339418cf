#!/usr/bin/env bash
# All runs of Table A5, which runs.yaml beside this lists: bash script/tablea5/all.sh --panel paper --scale cpu
# Pretrained runs that are missing are trained first. Finished ones are skipped, what was cut off goes on. --dry_run
# says what there is to do; --help lists the other flags.
exec bash "$(dirname "$0")/../panel.sh" tablea5 "$@"
