# What the scripts share; to be sourced, with `set -euo pipefail`, at the repository's root.

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

# without_flag NAME WORD...: sets the array `words` to the words without --NAME and its value.
without_flag() {
    local name=$1 dashed=${1//_/-} previous="" word
    shift
    words=()
    for word in "$@"; do
        case "$previous $word" in
            *" --$name" | *" --$name="* | "--$name "*) ;;
            *" --$dashed" | *" --$dashed="* | "--$dashed "*) ;;
            *) words+=("$word") ;;
        esac
        previous=$word
    done
}

# without_list NAME WORD...: sets the array `words` to the words without --NAME and all of its values.
without_list() {
    local name=$1 skipping=no word
    shift
    words=()
    for word in "$@"; do
        case "$word" in
            "--$name" | "--$name="* | "--${name//_/-}" | "--${name//_/-}="*) skipping=yes ;;
            --*) skipping=no ;;
        esac
        [ "$skipping" = yes ] || words+=("$word")
    done
}

# run_dir_of NAME WORD...: runs/NAME/<flags>, one folder per set of flags: "--scale smoke --seed 2" becomes
# scale-smoke_seed-2; a very long one is cut, and told apart by its checksum. NAME says model and method already.
# RUNS_DIR in the environment is another folder than runs.
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
    printf '%s' "${RUNS_DIR:-runs}/$name/${slug:-default}"
}

# run_dir_of_script SCRIPT WORD...: the run folder of SCRIPT when it is called with these flags; it may add flags of its
# own to them.
run_dir_of_script() {
    SHOW_FLAGS=1 bash "$@" | sed -n '/^--run_dir$/{n;p;}'
}

# absolute CALLED_FROM PATH: PATH, which may be relative to CALLED_FROM, in one spelling: without . and .. and a slash at
# its end, where its folder is there. A run that goes on takes another spelling for another place. Empty if PATH is.
absolute() {
    local path=$2 folder
    [ -n "$path" ] || return 0
    [[ $path == /* ]] || path=$1/$path
    folder=$(dirname "$path")
    if [ -d "$path" ]; then
        (cd "$path" && pwd)
    elif [ -d "$folder" ]; then
        folder=$(cd "$folder" && pwd)
        printf '%s' "${folder%/}/$(basename "$path")"
    else
        printf '%s' "$path"
    fi
}

# given_run CALLED_FROM WORD...: the run folder that a script's first word names, if it is no flag: it may be a checkpoint
# in it, and relative to CALLED_FROM.
given_run() {
    local run=${2:-}
    if [ -n "$run" ] && [[ $run != --* ]]; then
        run=$(absolute "$1" "$run")
        [ -f "$run/config.yaml" ] || run=${run%/checkpoints/*}
        absolute "$1" "$run"
    fi
}

# check_run RUN METHOD MODEL: ends the script with one line if the run's config.yaml has another method or model than the
# script is of, or no pretrained encoder where MODEL is `pretrained`: its run folder and its row are named after these.
# What is no run its trainer tells.
check_run() {
    local run=$1 method=$2 model=$3 was
    [ -f "$run/config.yaml" ] || return 0
    case "$method" in
        dense_model) method=dense_dropout ;;
        growing_k_smoe) method=smoe ;;
    esac
    was=$(sed -n 's/^model: *//p' "$run/config.yaml")
    was=${was:-transformer_xl}
    case "$model $was" in
        "$was $was" | "pretrained bert" | "pretrained roberta") ;;
        *)
            echo "error: $run has model $was; it must be ${model/pretrained/bert or roberta}" >&2
            exit 2
            ;;
    esac
    was=$(sed -n 's/^method: *//p' "$run/config.yaml")
    if [ "$was" != "$method" ]; then
        echo "error: $run has method $was; it must be $method" >&2
        exit 2
    fi
    was=$(sed -n 's/^start_from: *//p' "$run/config.yaml")
    if [ "$model" = pretrained ] && [ "${was:-null}" = null ]; then
        echo "error: $run was not adapted from a pretrained encoder; it must be of script/pretrained/$2.sh" >&2
        exit 2
    fi
}

# same_flags NAME...  -- WORD...: sets the array `words` to those flags, with their values, that WORD... has.
same_flags() {
    local names=() name value
    while [ "$1" != -- ]; do
        names+=("$1")
        shift
    done
    shift
    words=()
    for name in "${names[@]}"; do
        value=$(flag_value "$name" "$@")
        [ -z "$value" ] || words+=("--$name" "$value")
    done
}

# run_first RUN SCRIPT FLAG...: the run that another one starts from, unless it is finished: it may be of other data than
# SCRIPT would take. Under the lock of script/panel.py: several may start from the same run.
run_first() {
    local run=$1 lock=()
    shift
    mkdir -p "$run"
    if command -v flock >/dev/null; then
        lock=(flock "$run/.lock")
    fi
    ${lock[@]+"${lock[@]}"} bash -c '[ -f "$0/result.json" ] || exec bash "$@"' "$run" "$@"
}

# show_flags FLAG...: with SHOW_FLAGS set in the environment, prints the flags that the trainer would get, --run_dir
# included, one per line, and ends the script before it has done anything. script/panel.py asks for them.
show_flags() {
    if [ -n "${SHOW_FLAGS:-}" ]; then
        printf '%s\n' "$@"
        exit
    fi
}

# check_flags MODULE RUN_DIR FLAG...: ends the script with one line if the trainer would not take the flags, and after its
# --help. To be called before data are prepared and other runs are trained, which may take hours; a run that has begun had
# good flags.
check_flags() {
    local module=$1 run_dir=$2
    shift 2
    [ ! -f "$run_dir/config.yaml" ] || return 0
    python script/panel_runs.py flags "$module" "$@"
    case " $* " in
        *" --help "*) exit ;;
    esac
}

# train_and_report MODULE RUN_DIR FLAG...: trains on every GPU there is (else on the CPU), goes on where it stopped,
# prints the table over k, and draws it and the learning curve. With several processes torchrun starts them, and starts
# them again, from the newest good checkpoint, when one of them dies. What may be set in the environment:
#
#   NPROC_PER_NODE   processes on this machine (default: its GPUs, else 1)
#   MAX_RESTARTS     how often torchrun may start them again (default 3)
#   NNODES           machines (default 1); with several, call the script on each of them, with the same flags and
#   RDZV_ENDPOINT    HOST:PORT where they meet, on one of the machines, the same for all
#   RDZV_ID          a name of the job, the same for all (default: the run folder)
#   NODE_RANK        0 on the machine that prints the table (default: SLURM_NODEID, else 0)
#   PREPARE_ONLY     1: set up and prepare the data, train nothing: for one machine, before all of them call the script
#
# Every other setting of torchrun has a variable PET_... of its own. Exit code 75: stopped by a signal, with a
# checkpoint that the same command goes on from.
train_and_report() {
    local module=$1 run_dir=$2 processes=${NPROC_PER_NODE:-0} nodes=${NNODES:-1} launch child status=0 stopped=""
    shift 2
    if [ -n "${PREPARE_ONLY:-}" ]; then
        return
    fi
    if [ "$processes" = 0 ] && nvidia-smi >/dev/null 2>&1; then
        processes=$(python -c 'import torch; print(torch.cuda.device_count())')
    fi
    [ "$processes" -gt 0 ] || processes=1
    launch=(python script/launch.py --nproc_per_node "$processes" --max_restarts "${MAX_RESTARTS:-3}")
    if [ "$nodes" != 1 ]; then
        if [ -z "${RDZV_ENDPOINT:-}" ]; then
            echo "error: NNODES is $nodes; set RDZV_ENDPOINT to HOST:PORT of one of the machines, the same on each" >&2
            exit 2
        fi
        launch+=(--nnodes "$nodes" --rdzv_backend c10d --rdzv_endpoint "$RDZV_ENDPOINT" --rdzv_id "${RDZV_ID:-$run_dir}")
    elif [ "$processes" -gt 1 ]; then
        launch+=(--standalone)
    else
        launch=(python)
    fi
    # When torchrun is told to stop, its workers write a checkpoint; that may take longer than it would wait.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-60}
    # In the background: bash heeds no signal while something runs in front, and what runs may not have got it (`kill`,
    # a container that is stopped). Without the subshell's trap it would not know Ctrl-C.
    (trap - INT && exec "${launch[@]}" -m "$module" "$@" --resume) &
    child=$!
    trap 'stopped=yes; kill -TERM "$child" 2>/dev/null || true' TERM INT
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do # a signal has ended `wait` early
        status=0
        wait "$child" || status=$?
    done
    trap - TERM INT
    if [ ! -f "$run_dir/result.json" ] && [ -n "$stopped" ]; then
        exit 75
    elif [ "$status" != 0 ]; then
        exit "$status"
    fi
    if [ "${NODE_RANK:-${SLURM_NODEID:-0}}" != 0 ]; then
        return
    fi
    if [ ! -f "$run_dir/result.json" ]; then # the signal was to a worker, and torchrun takes the end for success
        exit 75
    fi
    python -m smoe.report "$run_dir" --plot "$run_dir/slimming.png" --curve "$run_dir/curve.png"
}
