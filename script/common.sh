# What script/transformer_xl.sh and script/bert.sh share; to be sourced, with `set -euo pipefail`, at the repository's root.

# Without cached bytecode every process would compile torch anew, a matter of seconds.
unset PYTHONDONTWRITEBYTECODE

# flag_value NAME WORD...: the value that a command line gives --NAME, the last one if it does so more than once.
flag_value() {
    local name=$1 value="" previous="" word
    shift
    for word in "$@"; do
        case "$previous" in
            "--$name" | "--${name//_/-}") value=$word ;;
        esac
        case "$word" in
            "--$name="* | "--${name//_/-}="*) value=${word#*=} ;;
        esac
        previous=$word
    done
    printf '%s' "$value"
}

# run_dir_of NAME WORD...: runs/NAME/<flags>, one folder per set of flags: "--scale smoke --seed 2" becomes
# scale-smoke_seed-2; a very long one is cut, and told apart by its checksum. NAME says model and method already.
run_dir_of() {
    local name=$1 flags="" slug word skip=0
    shift
    for word in "$@"; do
        case "$word" in
            --model | --method) skip=2 ;;
            --model=* | --method=*) skip=1 ;;
        esac
        if [ "$skip" -gt 0 ]; then
            skip=$((skip - 1))
        else
            flags+="${flags:+ }$word"
        fi
    done
    slug=$(printf '%s' "$flags" | sed -E 's/(^| )--?/_/g; s/^_//; s/[ =]+/-/g; s/[^A-Za-z0-9._-]+/-/g')
    if [ "${#slug}" -gt 120 ]; then
        slug=${slug:0:100}-$(printf '%s' "$flags" | cksum | cut -d ' ' -f 1)
    fi
    printf '%s' "runs/$name/${slug:-default}"
}

# train_and_report MODULE RUN_DIR FLAG...: trains on every GPU there is (else on the CPU), goes on where it stopped, and
# prints the table over k and draws it.
train_and_report() {
    local module=$1 run_dir=$2 gpus=0
    shift 2
    if nvidia-smi >/dev/null 2>&1; then
        gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    fi
    if [ "$gpus" -gt 1 ]; then
        torchrun --standalone --nproc_per_node "$gpus" -m "$module" "$@" --resume
    else
        python -m "$module" "$@" --resume
    fi
    python -m smoe.run.report "$run_dir" --plot "$run_dir/slimming.png"
}
