#!/usr/bin/env bash
# Table 1, BERT on BookCorpus: SMoE-Dropout (fixed random router, k grows from N/2 to N).
# Flags are those of python -m bert.pretrain: --scale paper|hour|cpu|smoke (default: paper on a GPU, else cpu),
# --seed N, ...; and --source FILES or FOLDER for text of your own (see script/bert.sh).
exec bash "$(dirname "$0")/../../bert.sh" table1/bert/smoe_dropout --model bert --method smoe_dropout "$@"
