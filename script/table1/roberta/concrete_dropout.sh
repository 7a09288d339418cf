#!/usr/bin/env bash
# Table 1, RoBERTa on BookCorpus: densely training with Concrete Dropout.
# Flags are those of python -m bert.pretrain: --scale paper|hour|cpu|smoke (default: paper on a GPU, else cpu),
# --seed N, ...; and --source FILES or FOLDER for text of your own (see script/bert.sh).
exec bash "$(dirname "$0")/../../bert.sh" table1/roberta/concrete_dropout --model roberta --method dense_concrete_dropout "$@"
