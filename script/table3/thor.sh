#!/usr/bin/env bash
# Table 3, SST-2: a Transformer-XL trained with THOR, distilled into a dense one of a single expert's width.
#
#   bash script/table3/thor.sh [fine-tuned run] [flags]
#
# Without a fine-tuned run the teacher is that of script/table2/sst2/thor.sh. script/table3.sh lists the flags.
exec bash "$(dirname "$0")/../table3.sh" thor "$@"
