#!/usr/bin/env bash
# Table 1, BERT on BookCorpus: THOR (uniformly random experts, two passes, consistency loss).
# Flags are those of python -m bert.pretrain: --scale paper|hour|cpu|smoke (default: paper on a GPU, else cpu),
# --seed N, ...; and --source FILES or FOLDER for text of your own (see script/bert.sh).
exec bash "$(dirname "$0")/../../bert.sh" table1/bert/thor --model bert --method thor "$@"
