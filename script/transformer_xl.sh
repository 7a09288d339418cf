#!/usr/bin/env bash
# Runs one Transformer-XL experiment from nothing to its table and plot; the scripts in the folders beside it call it.
#
#   bash script/transformer_xl.sh NAME [flags of python -m transformer_xl.train]
#
# Sets up .venv, prepares enwik8, trains on every GPU there is (else on the CPU), sweeps over k. The run folder is
# runs/NAME/<flags>, unless --run_dir says otherwise. Called again with the same flags it goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

name=$1
shift
data=data/enwik8
run_dir=""
flags=""
previous=""
for word in "$@"; do
    case "$previous" in
        --data) data=$word ;;
        --run_dir | --run-dir) run_dir=$word ;;
    esac
    case "$word" in
        --data=*) data=${word#*=} ;;
        --run_dir=* | --run-dir=*) run_dir=${word#*=} ;;
    esac
    previous=$word
    flags+=" $word"
done
if [ -z "$run_dir" ]; then
    # One folder per set of flags: "--scale smoke --seed 2" becomes scale-smoke_seed-2.
    slug=$(printf '%s' "${flags# }" | sed -E 's/(^| )--?/_/g; s/^_//; s/[ =]+/-/g; s/[^A-Za-z0-9._-]+/-/g')
    run_dir=runs/$name/${slug:-default}
    set -- "$@" --run_dir "$run_dir"
fi

bash script/setup.sh
source .venv/bin/activate
# --data names data that is there; the default place is filled if it is not.
[ "$data" != data/enwik8 ] || python data/enwik8/prepare.py

gpus=0
if nvidia-smi >/dev/null 2>&1; then
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
fi
if [ "$gpus" -gt 1 ]; then
    torchrun --standalone --nproc_per_node "$gpus" -m transformer_xl.train "$@" --resume
else
    python -m transformer_xl.train "$@" --resume
fi
python -m smoe.run.report "$run_dir" --plot "$run_dir/slimming.png"
