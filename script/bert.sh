#!/usr/bin/env bash
# Runs one BERT or RoBERTa experiment from nothing to its table and plot; the scripts in table1/bert and table1/roberta
# call it.
#
#   bash script/bert.sh NAME --model bert|roberta [flags of python -m bert.pretrain]
#                            [--source FILE|FOLDER ...] [--tokenizer FOLDER|FILES] [--vocab_size N]
#                            [--block_length N] [--max_bytes N] [--name NAME] [--out FOLDER]
#
# Sets up .venv, prepares the text (the flags in the last two lines are those of data/bookcorpus/prepare.py; without
# --source it is BookCorpus from the hub, else prose out of enwik8), trains on every GPU there is (else on the CPU),
# sweeps over k.
# The run folder is runs/NAME/<flags>, without --source, unless --run_dir says otherwise: what is fine-tuned from it need
# not name the text again. Called again with the same flags it goes on where it stopped. --data names data that is
# prepared already.
set -euo pipefail
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source script/common.sh

name=$1
shift
model=$(flag_value model "$@")
scale=$(flag_value scale "$@")
data=$(flag_value data "$@")
run_dir=$(flag_value run_dir "$@")

# A flag of prepare.py and the words up to the next flag are for it, the rest is for the trainer.
prepare=()
train=()
for_prepare=no
for word in "$@"; do
    case "$word" in
        --source | --source=* | --tokenizer | --tokenizer=* | --vocab_size | --vocab_size=* | --max_bytes | --max_bytes=* | --block_length | --block_length=* | --name | --name=* | --out | --out=*)
            for_prepare=yes
            ;;
        --*) for_prepare=no ;;
    esac
    if [ "$for_prepare" = yes ]; then
        flag=""
        [[ $word != --*=* ]] || flag=${word%%=*}=
        value=${word#"$flag"}
        # It may be a path relative to where the script was called.
        [[ $value == /* ]] || [ ! -e "$called_from/$value" ] || word=$flag$called_from/$value
        prepare+=("$word")
    else
        train+=("$word")
    fi
done
if [ -n "$data" ] && [ "${#prepare[@]}" -gt 0 ]; then
    echo "error: --data names data that is prepared already, so ${prepare[0]} has no effect; give one of them" >&2
    exit 2
fi
if [ -z "$run_dir" ]; then
    without_list source "$@"
    run_dir=$(run_dir_of "$name" ${words[@]+"${words[@]}"})
    train+=(--run_dir "$run_dir")
fi
show_flags "${train[@]}"

bash script/setup.sh
source .venv/bin/activate
check_flags bert.pretrain "$run_dir" "${train[@]}"
if [ -z "$data" ]; then
    data=$(python data/bookcorpus/prepare.py --model "${model:-bert}" --scale "${scale:-auto}" ${prepare[@]+"${prepare[@]}"})
    train+=(--data "$data")
fi

train_and_report bert.pretrain "$run_dir" "${train[@]}"
