#!/usr/bin/env bash
# Fine-tunes a pretrained model on a data set of Table 2 or A6, from nothing to its table; the scripts in table2/, tablea6/
# and pretrained/ call it.
#
#   bash script/table2.sh TASK MODEL METHOD [RUN] [--setting paper|all] [--source FOLDER] [flags of the trainer]
#
#   TASK     sst2, csqa, asdiv_a, mawps, svamp or hotpotqa (Table A6)
#   MODEL    transformer_xl, bert or roberta; pretrained: an encoder that script/pretrained.sh has adapted
#   METHOD   dense_model, smoe_dropout, smoe or thor; growing_k_smoe with sst2
#   RUN      the run folder (or one of its checkpoints) to start from, of METHOD and MODEL; without it, that of METHOD's
#            script in table1/ at the same scale and seed, or of pretrained/ with --start_from, which is trained first if
#            there is none
#   --start_from FOLDER   with MODEL pretrained and no RUN: the encoder, as for script/pretrained.sh
#   --text FILE|FOLDER    the text that it is adapted to, as --source is to script/pretrained.sh; once it is adapted, no
#                     other one
#   --setting paper   as the paper trains: 3 epochs of batches of 64 at its learning rate; of word problems with bert and
#                     roberta the fold that its numbers fit
#   --setting all     until 4 evaluations in a row bring no new best on valid, at most 1200 steps for CSQA and word
#                     problems, and as many as their scale says for the others
#                     Other flags win over those of a setting. Given --steps or --epochs, or at scale smoke, it says
#                     nothing of how long to train.
#   --source FOLDER   the data set, instead of a download: for data/TASK/prepare.py
#   --subquestions FILE   hotpotqa: for data/hotpotqa/prepare.py
#
# The trainer is transformer_xl.classify or a module of bert: classify, multiple_choice, math_word_problems,
# question_answering. The run folder is runs/table2/TASK/MODEL/METHOD/<flags> (without the model for sst2;
# runs/tablea6/METHOD/<flags> for hotpotqa, runs/pretrained/TASK/METHOD/<flags>), unless --run_dir says otherwise. Called
# again with the same flags it goes on where it stopped.
set -euo pipefail
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source script/common.sh

task=$1
model=$2
method=$3
shift 3
name=table2/$task/$model/$method
first=table1/$model/$method # the script of the run to start from
case "$task" in
    sst2) module=bert.classify ;;
    csqa) module=bert.multiple_choice ;;
    hotpotqa) module=bert.question_answering ;;
    *) module=bert.math_word_problems ;;
esac
case "$task/$model" in
    sst2/transformer_xl)
        name=table2/$task/$method
        first=table1/$method
        module=transformer_xl.classify
        ;;
    */pretrained)
        name=pretrained/$task/$method
        first=pretrained/$method
        ;;
    hotpotqa/*) name=tablea6/$method ;;
esac
case "$first" in
    table1/*dense_model) first=${first%dense_model}directly_dense_training ;;
    table1/growing_k_smoe) # Table A5's
        name=tablea5/$method
        first=figure5/$method
        ;;
esac

pretrained=$(given_run "$called_from" "$@")
[ -z "$pretrained" ] || shift
check_run "$pretrained" "$method" "$model"
data=$(flag_value data "$@")
run_dir=$(flag_value run_dir "$@")
source=$(absolute "$called_from" "$(flag_value source "$@")")
setting=$(flag_value setting "$@")
without_flag source "$@"
set -- ${words[@]+"${words[@]}"}
folder=""
if [ "$model" = pretrained ]; then
    folder=$(absolute "$called_from" "$(flag_value start_from "$@")")
    text=$(absolute "$called_from" "$(flag_value text "$@")")
    if [ -n "$pretrained" ] && [ -n "$folder$text" ]; then
        echo "error: $pretrained is given to start from, so --start_from and --text have no effect; leave them out" >&2
        exit 2
    elif [ -z "$pretrained$folder" ]; then
        echo "error: nothing to start from; give a run of script/pretrained/$method.sh, or --start_from and a folder" \
            "of a BERT or RoBERTa as Hugging Face stores it" >&2
        exit 2
    fi
    without_flag start_from "$@"
    without_flag text ${words[@]+"${words[@]}"}
    set -- ${words[@]+"${words[@]}"}
fi
subquestions=""
if [ "$task" = hotpotqa ]; then
    subquestions=$(absolute "$called_from" "$(flag_value subquestions "$@")")
    without_flag subquestions "$@"
    set -- ${words[@]+"${words[@]}"}
fi
from=$pretrained$folder
if [ -z "$run_dir" ]; then
    run_dir=$(run_dir_of "$name" ${from:+--from "$(basename "$from")"} "$@")
    set -- "$@" --run_dir "$run_dir"
fi
without_flag setting "$@"
set -- "${words[@]}"

own=()
if [ "$model" = pretrained ]; then # what knows something forgets it at the rates of the small models' scales
    own=(--learning_rate 5e-5)
    # The decoder of equations starts from random weights.
    [ "$module" != bert.math_word_problems ] || own=(--learning_rate 2e-4)
fi
long=() # what the setting says of how long to train
case "$setting" in
    "") ;;
    paper)
        long=(--epochs 3)
        own+=(--batch_size 64 --learning_rate 2e-5 --warmup_steps 0)
        [ "$model" != transformer_xl ] || own=(--batch_size 64 --learning_rate 1e-4 --warmup_steps 0)
        [ "$task/$model" != svamp/bert ] || own+=(--fold 4)
        [ "$task/$model" != svamp/roberta ] || own+=(--fold 1)
        ;;
    all)
        own+=(--patience 4)
        [ "$task" = sst2 ] || [ "$task" = hotpotqa ] || long=(--steps 1200)
        ;;
    *)
        echo "error: --setting is $setting; it must be paper or all" >&2
        exit 2
        ;;
esac
if [ "$(flag_value scale "$@")" = smoke ] || [ -n "$(flag_value steps "$@")$(flag_value epochs "$@")" ]; then
    long=()
fi
own+=(${long[@]+"${long[@]}"})
if [ -n "$source$subquestions" ] && [ -n "$data" ]; then
    flag=--source
    [ -n "$source" ] || flag=--subquestions
    echo "error: --data names data that is prepared already, so $flag has no effect; give one of them" >&2
    exit 2
fi
[ -n "$data" ] || own+=(--data "data/$task")
set -- ${own[@]+"${own[@]}"} "$@"

same_flags scale seed -- "$@"
same=(${words[@]+"${words[@]}"})
train_first=no
if [ -z "$pretrained" ]; then
    train_first=yes
    if [ -n "$folder" ]; then
        same+=(--start_from "$folder" ${text:+--source "$text"})
    fi
    pretrained=$(run_dir_of_script "script/$first.sh" ${same[@]+"${same[@]}"})
fi
show_flags --run "$pretrained" "$@"

bash script/setup.sh
source .venv/bin/activate
check_flags "$module" "$run_dir" --run "$pretrained" "$@"
if [ -n "$folder" ] && [ -d "$pretrained" ]; then # its name has neither the text nor where the encoder is
    python script/panel_runs.py start "$pretrained" "$folder" "$text"
fi
if [ -z "$data" ]; then
    python "data/$task/prepare.py" ${source:+--source "$source"} ${subquestions:+--subquestions "$subquestions"}
fi
if [ "$train_first" = yes ]; then
    run_first "$pretrained" "script/$first.sh" ${same[@]+"${same[@]}"}
fi

train_and_report "$module" "$run_dir" --run "$pretrained" "$@"
