#!/usr/bin/env bash
# Runs one Transformer-XL experiment from nothing to its table and plot; the scripts in the folders beside it call it.
#
#   bash script/transformer_xl.sh NAME [flags of python -m transformer_xl.train]
#
# Sets up .venv, prepares enwik8, trains on every GPU there is (else on the CPU), sweeps over k. The run folder is
# runs/NAME/<flags>, unless --run_dir says otherwise. Called again with the same flags it goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source script/common.sh

name=$1
shift
data=$(flag_value data "$@")
run_dir=$(flag_value run_dir "$@")
if [ -z "$run_dir" ]; then
    run_dir=$(run_dir_of "$name" "$@")
    set -- "$@" --run_dir "$run_dir"
fi

bash script/setup.sh
source .venv/bin/activate
# --data names data that is there; the default place is filled if it is not.
[ "${data:-data/enwik8}" != data/enwik8 ] || python data/enwik8/prepare.py

train_and_report transformer_xl.train "$run_dir" "$@"
