#!/usr/bin/env bash
# Fine-tunes a pretrained model on a data set of Table 2 or A6, from nothing to its table; the scripts in table2/ and
# tablea6/ call it.
#
#   bash script/table2.sh TASK MODEL METHOD [RUN] [--setting paper|all] [--source FOLDER] [flags of the trainer]
#
#   TASK     sst2, csqa, asdiv_a, mawps, svamp or hotpotqa (Table A6)        MODEL    transformer_xl, bert or roberta
#   METHOD   dense_model, smoe_dropout, smoe or thor; growing_k_smoe with sst2
#   RUN      the run folder (or one of its checkpoints) to start from; without it, that of METHOD's script in table1/ at
#            the same scale and seed, which is trained first if there is none
#   --setting paper   as the paper trains: 3 epochs of batches of 64 at its learning rate; of word problems the fold
#                     that its numbers fit. Other flags win over these.
#   --setting all     until 4 evaluations in a row bring no new best on valid, at most 1200 steps for CSQA and word
#                     problems, and as many as their scale says for the others
#   --source FOLDER   the data set, instead of a download: for data/TASK/prepare.py
#   --subquestions FILE   hotpotqa: for data/hotpotqa/prepare.py
#
# The trainer is transformer_xl.classify or a module of bert: classify, multiple_choice, math_word_problems,
# question_answering. The run folder is runs/table2/TASK/MODEL/METHOD/<flags> (without the model for sst2;
# runs/tablea6/METHOD/<flags> for hotpotqa), unless --run_dir says otherwise. Called again with the same flags it goes on
# where it stopped.
set -euo pipefail
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source script/common.sh

task=$1
model=$2
method=$3
shift 3
name=table2/$task/$model/$method
table1=table1/$model
case "$task/$model" in
    sst2/transformer_xl)
        name=table2/$task/$method
        table1=table1
        module=transformer_xl.classify
        ;;
    sst2/*) # not in the table: script/pretrained/sst2
        name=pretrained/$task/$method
        module=bert.classify
        ;;
    csqa/*) module=bert.multiple_choice ;;
    hotpotqa/*)
        name=tablea6/$method
        module=bert.question_answering
        ;;
    *) module=bert.math_word_problems ;;
esac
case "$method" in
    dense_model) table1=$table1/directly_dense_training ;;
    growing_k_smoe) # Table A5's
        name=tablea5/$method
        table1=figure5/$method
        ;;
    *) table1=$table1/$method ;;
esac

pretrained=$(given_run "$called_from" "$@")
[ -z "$pretrained" ] || shift
data=$(flag_value data "$@")
run_dir=$(flag_value run_dir "$@")
source=$(flag_value source "$@")
setting=$(flag_value setting "$@")
without_flag source "$@"
set -- ${words[@]+"${words[@]}"}
subquestions=""
if [ "$task" = hotpotqa ]; then
    subquestions=$(flag_value subquestions "$@")
    without_flag subquestions "$@"
    set -- ${words[@]+"${words[@]}"}
fi
if [ -z "$run_dir" ]; then
    run_dir=$(run_dir_of "$name" ${pretrained:+--from "$(basename "$pretrained")"} "$@")
    set -- "$@" --run_dir "$run_dir"
fi
without_flag setting "$@"
set -- "${words[@]}"

own=()
case "$setting" in
    "") ;;
    paper)
        own=(--epochs 3 --batch_size 64 --learning_rate 2e-5 --warmup_steps 0)
        [ "$model" != transformer_xl ] || own=(--epochs 3 --batch_size 64 --learning_rate 1e-4 --warmup_steps 0)
        [ "$task/$model" != svamp/bert ] || own+=(--fold 4)
        [ "$task/$model" != svamp/roberta ] || own+=(--fold 1)
        ;;
    all)
        own=(--patience 4)
        [ "$task" = sst2 ] || [ "$task" = hotpotqa ] || own+=(--steps 1200)
        ;;
    *)
        echo "error: --setting is $setting; it must be paper or all" >&2
        exit 2
        ;;
esac
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
first=""
if [ -z "$pretrained" ]; then
    first=script/$table1.sh
    pretrained=$(run_dir_of "$table1" ${same[@]+"${same[@]}"})
fi
show_flags --run "$pretrained" "$@"

bash script/setup.sh
source .venv/bin/activate
if [ -z "$data" ]; then
    [[ -z $source || $source == /* ]] || source=$called_from/$source
    [[ -z $subquestions || $subquestions == /* ]] || subquestions=$called_from/$subquestions
    python "data/$task/prepare.py" ${source:+--source "$source"} ${subquestions:+--subquestions "$subquestions"}
fi
if [ -n "$first" ]; then
    run_first "$pretrained" "$first" ${same[@]+"${same[@]}"}
fi

train_and_report "$module" "$run_dir" --run "$pretrained" "$@"
