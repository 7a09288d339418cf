#!/usr/bin/env bash
# Makes .venv at the repository's root with everything the scripts and tests need, pinned by requirements.txt.
# Safe to run at any time: silent and instant when there is nothing to do, starts over after an interruption, and waits
# for another one that is at work. Needs Python 3.10 or newer and the Python package index.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=$root/.venv
stamp=$venv/.smoe-setup
log=$venv/.smoe-setup.log

# What the environment depends on. An editable install lists the top-level packages by name, so they belong to it.
wanted() {
    echo "$root"
    "$venv/bin/python" -V
    ls -d smoe/__init__.py transformer_xl/__init__.py bert/__init__.py 2>/dev/null || true
    cksum requirements.txt setup.py pyproject.toml script/setup.sh
}

is_done() {
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(wanted 2>/dev/null)" ]
}

say() {
    echo "setup: $*" >&2
}

fail() {
    say "$*"
    exit 1
}

# --no-compile: byte-compiling every module of every package takes longer than installing them; Python compiles those
# that are imported when they are.
pip_install() {
    "$venv/bin/python" -m pip --disable-pip-version-check --no-input install --no-compile "$@" >"$log" 2>&1 </dev/null
}

show_log() {
    tail -n 20 "$log" >&2
}

find_python() {
    local python
    for python in python3 python; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    fail "no python3 of version 3.10 or newer on the PATH"
}

make_venv() {
    # A marker of unfinished work means that something may be half-installed.
    if [ ! -e "$venv/.unfinished" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    local python output
    python=$(find_python)
    say "Python environment in .venv ($("$python" -V))"
    if ! output=$("$python" -m venv --clear "$venv" 2>&1); then
        fail "$python -m venv failed: ${output:-no message} (on Debian and Ubuntu: apt install python3-venv)"
    fi
}

# Without an NVIDIA GPU the CUDA build of torch would be gigabytes of download for nothing. The CPU build has its own
# index, unless the index that pip is configured with carries it.
install_torch() {
    local pin cpu_index=https://download.pytorch.org/whl/cpu
    pin=$(grep -E '^torch==' requirements.txt)
    if [ "$(uname -s)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; then
        say "$pin, CPU build"
        if pip_install "$pin+cpu" || pip_install --retries 1 --timeout 30 --extra-index-url "$cpu_index" "$pin+cpu"; then
            return
        fi
        say "no CPU build to be had, taking the standard one"
    else
        say "$pin"
    fi
    pip_install "$pin" || { show_log; fail "can't install $pin"; }
}

if is_done; then
    exit 0
fi

if command -v flock >/dev/null; then
    exec 9>"$root/.venv.lock"
    if ! flock -n 9; then
        say "waiting for another setup.sh"
        flock 9
    fi
    if is_done; then
        exit 0
    fi
fi

rm -f "$stamp"
make_venv
touch "$venv/.unfinished"
install_torch
say "the packages of requirements.txt"
pip_install -r requirements.txt || { show_log; fail "can't install requirements.txt"; }
say "smoe, editable"
pip_install --no-deps --no-build-isolation -e . || { show_log; fail "can't install the project"; }
rm -f "$venv/.unfinished" "$log"
wanted >"$stamp.new"
mv "$stamp.new" "$stamp"
say "done in $SECONDS s"
