#!/usr/bin/env bash
# Lint, format check and tests; arguments go to pytest: bash script/test.sh tests/smoe -k router
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/script/setup.sh"
cd "$root"
# Without cached bytecode every process would compile torch anew, a matter of seconds.
unset PYTHONDONTWRITEBYTECODE
# The tests' tensors are tiny: threads cost more than they bring.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# One process per core; each file stays in one process, which makes its models and servers once. tests/conftest.py
# orders the files.
exec .venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
