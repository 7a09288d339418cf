#!/usr/bin/env bash
# Fine-tunes a Transformer-XL on SST-2, from nothing to its table; the scripts in table2/sst2 call it.
#
#   bash script/sst2.sh NAME TABLE1 [RUN] [flags of python -m transformer_xl.classify]
#
# Starts from the run folder RUN (or one of its checkpoints); without it, from the run of script/table1/TABLE1.sh at the
# same scale and seed, which is trained first if there is none. The run folder is runs/NAME/<flags>, unless --run_dir says
# otherwise. Called again with the same flags it goes on where it stopped.
set -euo pipefail
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source script/common.sh

name=$1
table1=$2
shift 2
pretrained=""
if [ $# -gt 0 ] && [[ $1 != --* ]]; then
    pretrained=${1%%/checkpoints/*}
    [[ $pretrained == /* ]] || pretrained=$called_from/$pretrained
    shift
fi
data=$(flag_value data "$@")
run_dir=$(flag_value run_dir "$@")
if [ -z "$run_dir" ]; then
    run_dir=$(run_dir_of "$name" ${pretrained:+--from "$(basename "$pretrained")"} "$@")
    set -- "$@" --run_dir "$run_dir"
fi

bash script/setup.sh
source .venv/bin/activate
[ "${data:-data/sst2}" != data/sst2 ] || python data/sst2/prepare.py
if [ -z "$pretrained" ]; then
    same=()
    for flag in scale seed; do
        value=$(flag_value "$flag" "$@")
        [ -z "$value" ] || same+=("--$flag" "$value")
    done
    bash "script/table1/$table1.sh" ${same[@]+"${same[@]}"}
    pretrained=$(run_dir_of "table1/$table1" ${same[@]+"${same[@]}"})
fi

train_and_report transformer_xl.classify "$run_dir" --run "$pretrained" "$@"
