#!/usr/bin/env bash
# Runs one Transformer-XL experiment from nothing to its table and plot; the scripts in the folders beside it call it.
#
#   bash script/transformer_xl.sh NAME [--newlines keep|drop] [flags of python -m transformer_xl.train]
#
# Sets up .venv, prepares enwik8, trains on every GPU there is (else on the CPU), sweeps over k. The run folder is
# runs/NAME/<flags>, unless --run_dir says otherwise. Called again with the same flags it goes on where it stopped.
# --newlines drop trains and tests without enwik8's newlines, as the paper does (data/enwik8/prepare.py).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source script/common.sh

name=$1
shift
data=$(flag_value data "$@")
newlines=$(flag_value newlines "$@")
run_dir=$(flag_value run_dir "$@")
if [ -z "$run_dir" ]; then
    run_dir=$(run_dir_of "$name" "$@")
    set -- "$@" --run_dir "$run_dir"
fi

if [ -n "$newlines" ]; then
    case "$newlines" in
        keep) folder=data/enwik8 ;;
        drop) folder=data/enwik8-no-newlines ;;
        *)
            echo "error: --newlines is $newlines; it must be keep or drop" >&2
            exit 2
            ;;
    esac
    if [ -n "$data" ]; then
        echo "error: --data names data that is prepared already, so --newlines has no effect; give one of them" >&2
        exit 2
    fi
    without_flag newlines "$@" # the trainer is told the folder instead
    set -- "${words[@]}" --data "$folder"
fi
show_flags "$@"

bash script/setup.sh
source .venv/bin/activate
# --data names data that is there; the default place is filled if it is not.
[ "${data:-data/enwik8}" != data/enwik8 ] || python data/enwik8/prepare.py --newlines "${newlines:-keep}"

train_and_report transformer_xl.train "$run_dir" "$@"
