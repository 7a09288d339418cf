#!/usr/bin/env bash
# All runs of Figure 4, which runs.yaml beside this lists: bash script/figure4/all.sh --panel sst2_all --scale cpu
# The data of a task vote for the experts of a pretrained run; those are kept and fine-tuned, all of them active.
# Without --panel that is 760 trainings per seed, of which Table 2 has 200. Finished ones are skipped, what was cut off
# goes on. --dry_run says what there is to do; --help lists the other flags.
exec bash "$(dirname "$0")/../panel.sh" figure4 "$@"
