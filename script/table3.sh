#!/usr/bin/env bash
# Distils a fine-tuned Transformer-XL into a dense one as wide as one of its experts, on SST-2; the scripts in table3/ call
# it.
#
#   bash script/table3.sh METHOD [RUN] [--source FOLDER] [flags of python -m transformer_xl.distil]
#
#   METHOD   dense_model, smoe_dropout, smoe or thor: what the teacher was trained with
#   RUN      the teacher's run folder (or one of its checkpoints); without it, that of METHOD's script in table2/sst2/ at
#            the same scale and seed, which is trained first if there is none
#   --source FOLDER   SST-2, instead of a download: for data/sst2/prepare.py
#
# The run folder is runs/table3/METHOD/<flags>, unless --run_dir says otherwise. Called again with the same flags it goes
# on where it stopped.
set -euo pipefail
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source script/common.sh

method=$1
shift
teacher=$(given_run "$called_from" "$@")
[ -z "$teacher" ] || shift
check_run "$teacher" "$method" transformer_xl
data=$(flag_value data "$@")
source=$(absolute "$called_from" "$(flag_value source "$@")")
if [ -n "$source" ] && [ -n "$data" ]; then
    echo "error: --data names data that is prepared already, so --source has no effect; give one of them" >&2
    exit 2
fi
without_flag source "$@"
set -- ${words[@]+"${words[@]}"}
if [ -z "$(flag_value run_dir "$@")" ]; then
    set -- "$@" --run_dir "$(run_dir_of "table3/$method" ${teacher:+--from "$(basename "$teacher")"} "$@")"
fi
run_dir=$(flag_value run_dir "$@")
same_flags scale seed -- "$@"
same=(${words[@]+"${words[@]}"})
first=""
if [ -z "$teacher" ]; then
    first=script/table2/sst2/$method.sh
    same+=(${data:+--data "$data"})
    teacher=$(run_dir_of_script "$first" ${same[@]+"${same[@]}"})
fi
show_flags --teacher "$teacher" "$@"

bash script/setup.sh
source .venv/bin/activate
check_flags transformer_xl.distil "$run_dir" --teacher "$teacher" "$@"
[ -n "$data" ] || python data/sst2/prepare.py ${source:+--source "$source"}
if [ -n "$first" ]; then
    run_first "$teacher" "$first" ${same[@]+"${same[@]}"}
fi

train_and_report transformer_xl.distil "$run_dir" --teacher "$teacher" "$@"
