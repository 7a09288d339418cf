#!/usr/bin/env bash
# Writes results/REPORT.md, results/report.html, the plots in Figs/ and the tables of README.md and docs/pretrained.md
# from the records in results/, and from nothing else.
#
#   bash script/report.sh
#
# To put a finished run there: cp runs/table1/METHOD/default/result.json results/table1/cpu/METHOD-seed1.json
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash script/setup.sh
source .venv/bin/activate
python -m smoe.report results/table1/cpu/*.json --plot Figs/table1_cpu.png --into README.md --block table1-cpu
python -m smoe.report results/table1/hour/*.json --plot Figs/table1_hour.png --into README.md --block table1-hour
for scale in cpu hour; do
    for model in bert roberta; do
        python -m smoe.report results/table1/$scale/$model/*.json --plot Figs/table1_${scale}_$model.png \
            --into README.md --block table1-$scale-$model
    done
done
python -m smoe.report --part table2 --into README.md --block table2 >/dev/null
for document in README.md docs/pretrained.md; do
    python -m smoe.report --part encoder --into "$document" --block encoder >/dev/null
done
python -m smoe.report --all
