#!/usr/bin/env bash
# SST-2 with a pretrained encoder: smoe_dropout.
#
#   bash script/pretrained/sst2/smoe_dropout.sh RUN [flags of python -m bert.classify]
#
# RUN is what script/pretrained/smoe_dropout.sh left. For CSQA and the word problems give it to the scripts of table2/, such
# as bash script/table2/csqa/bert/smoe_dropout.sh RUN --learning_rate 5e-5. script/table2.sh lists the flags.
exec bash "$(dirname "$0")/../../table2.sh" sst2 bert smoe_dropout "$@"
