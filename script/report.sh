#!/usr/bin/env bash
# Writes the tables of README.md and the plots in Figs/ from the records in results/, and from nothing else.
#
#   bash script/report.sh
#
# To put finished runs there: cp runs/table1/METHOD/default/result.json results/table1/cpu/METHOD.json
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash script/setup.sh
source .venv/bin/activate
python -m smoe.report results/table1/cpu/*.json --plot Figs/table1_cpu.png --into README.md --block table1-cpu
for model in bert roberta; do
    python -m smoe.report results/table1/cpu/$model/*.json --plot Figs/table1_cpu_$model.png \
        --into README.md --block table1-cpu-$model
done
