#!/usr/bin/env bash
# All runs of Table A4, which runs.yaml beside this lists: Table 2's of SST-2 with seeds 1, 2 and 3 (--seeds: others).
# Pretrained runs of these seeds that are missing are trained first. Finished ones are skipped, what was cut off goes on.
# --dry_run says what there is to do; --help lists the other flags.
exec bash "$(dirname "$0")/../panel.sh" tablea4 --seeds 1 2 3 "$@"
