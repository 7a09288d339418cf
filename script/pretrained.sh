#!/usr/bin/env bash
# Adapts a pretrained BERT or RoBERTa to text without labels; the scripts in pretrained/ call it.
#
#   bash script/pretrained.sh METHOD --start_from FOLDER [--source FILE|FOLDER ...] [flags of python -m bert.pretrain]
#
# FOLDER is a dense model as Hugging Face stores it, with its tokenizer: safetensors, config.json, tokenizer.json. Its MLPs
# are cut into 16 experts, which train with growing k (METHOD smoe_dropout), or stay as they are (dense_model). --source
# is the text, as for script/bert.sh. The run folder is runs/pretrained/METHOD/from-<FOLDER's name>_<flags>, without
# --source, unless --run_dir says otherwise. Called again with the same flags it goes on where it stopped.
set -euo pipefail
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source script/common.sh

method=$1
shift
folder=$(absolute "$called_from" "$(flag_value start_from "$@")")
if [ -z "$folder" ]; then
    echo "error: --start_from is missing; give a folder of a BERT or RoBERTa as Hugging Face stores it" >&2
    exit 2
fi
case "$method" in
    dense_model) own=(--method dense_dropout) ;;
    *) own=(--method "$method") ;;
esac
# No more steps than a pretrained model needs to get used to its experts (at scale smoke those of the scale), at a rate at
# which it forgets little; dropout where Hugging Face's models have it, not inside the MLPs.
own+=(--batch_size 32 --seq_len 64 --mask_share 0.15 --learning_rate 1e-4 --dropout 0 --residual_dropout 0.1)
[ "$(flag_value scale "$@")" = smoke ] || own+=(--steps 1000 --warmup_steps 100)
without_flag start_from "$@"
run_dir=$(flag_value run_dir "$@")
set -- ${words[@]+"${words[@]}"}
if [ -z "$run_dir" ]; then
    without_list source "$@"
    run_dir=$(run_dir_of "pretrained/$method" --from "$(basename "$folder")" ${words[@]+"${words[@]}"})
    own+=(--run_dir "$run_dir")
fi
set -- "${own[@]}" "$@" --start_from "$folder"
show_flags "$@"
if [ -z "$(flag_value data "$@")" ]; then
    scale=$(flag_value scale "$@")
    seq_len=$(flag_value seq_len "$@")
    out=data/bookcorpus/$(basename "$folder")-${scale:-auto}-$seq_len
    set -- "$@" --tokenizer "$folder" --block_length "$seq_len" --out "$out"
fi
model=$(sed -n 's/.*"model_type": *"\([a-z]*\)".*/\1/p' "$folder/config.json" 2>/dev/null || true)
cd "$called_from"
exec bash "$OLDPWD/script/bert.sh" pretrained --model "${model:-bert}" "$@"
