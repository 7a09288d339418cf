#!/usr/bin/env bash
# Sets up .venv and runs all trainings of a table or figure: bash script/panel.sh NAME [flags of script/panel.py]
set -euo pipefail
export CALLED_FROM=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONDONTWRITEBYTECODE
bash script/setup.sh
exec .venv/bin/python script/panel.py "$@"
