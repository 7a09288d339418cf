#!/usr/bin/env bash
# Table A6, HotpotQA with BERT: a model pretrained with learnable SMoE, fine-tuned.
#
#   bash script/tablea6/smoe.sh [pretrained run] [--source FOLDER] [--subquestions FILE] [flags]
#
# Without a pretrained run it is that of script/table1/bert. script/table2.sh lists the flags.
exec bash "$(dirname "$0")/../table2.sh" hotpotqa bert smoe "$@"
