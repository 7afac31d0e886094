#!/usr/bin/env bash
# Everything that needs a GPU: tests, then benchmarks, the most telling cases first. Run from anywhere; no network.
#
#   benchmarks/gpu.sh                      # results into benchmarks/results
#   OUT=/tmp/results benchmarks/gpu.sh     # somewhere else
#   SMALL=1 benchmarks/gpu.sh              # does it work at all? a few minutes
#   ONLY="tests prediction" benchmarks/gpu.sh
#   BUDGET=540 benchmarks/gpu.sh           # seconds: begins nothing after them, and says what is left
#
# The same command again goes on: tests that passed on the same code, GPU and versions, and cases that lie in $OUT with the same
# machine, versions and options, are not run again unless FRESH=1. So it fits into calls of ten minutes: BUDGET=540, twice.
#
# PYTHON names the interpreter, DEVICE=cpu tries the script without a GPU. Every step runs whatever became of those before it. The
# exit status is 1 if one failed, 3 if none failed and something is left. Each row of a JSON file holds the machine, the date and
# the versions, and the file is rewritten after each case: what a time limit cuts off has lost its last case only.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results}
PYTHON=${PYTHON:-python}
DEVICE=${DEVICE:-cuda}
ONLY=${ONLY:-tests prediction attention step step-attention}
UNTIL=$(($(date +%s) + ${BUDGET:-86400}))
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT"
failed=() left=()

wanted() { [[ " $ONLY " == *" $1 "* ]]; }

facts() { # of the tests: code, GPU, versions
    find daekit tests -name '*.py' | sort | xargs cat | sha256sum
    "$PYTHON" -c 'import torch; print(torch.__version__, torch.cuda.is_available() and torch.cuda.get_device_name())'
}

tests() { # NAME PYTEST-OPTIONS...; no tests collected (status 5) is no failure
    local stamp=$OUT/tests-$1-$DEVICE.passed
    shift
    if [[ -z ${FRESH:-} && -f $stamp && $(cat "$stamp") == "$FACTS" ]]; then
        echo "== pytest $*: passed already"
        return 0
    fi
    local seconds=$((UNTIL - $(date +%s)))
    ((seconds > 0)) || { left+=("pytest $*") && return 0; }
    timeout "$seconds" "$PYTHON" -m pytest "$@"
    case $? in
    0 | 5) echo "$FACTS" >"$stamp" ;;
    124) left+=("pytest $*, which the time cut off") ;;
    *) failed+=("pytest $*") ;;
    esac
}

benchmark() { # FIRST NAME SCRIPT OPTIONS...: its first cases, or all where FIRST is empty
    local first=$1 name=$2 script=$3
    shift 3
    wanted "$name" || return 0
    echo "== $name${first:+, the first}"
    "$PYTHON" "benchmarks/$script.py" --device "$DEVICE" ${SMALL:+--small} --until "$UNTIL" ${first:+--first "$first"} \
        --resume --json "$OUT/$name-$DEVICE.json" "$@" 2>>"$OUT/$name-$DEVICE.log"
    case $? in
    0) ;;
    3) [[ -n $first ]] || left+=("$name: see its last line above") ;;
    *) failed+=("$name (see $OUT/$name-$DEVICE.log)") ;;
    esac
}

benchmarks() { # FIRST
    benchmark "$1" prediction prediction
    benchmark "$1" step step
    benchmark "$1" attention attention
    benchmark "$1" step-attention step --attention-weight 1
}

if [[ $DEVICE == cuda ]]; then
    "$PYTHON" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "gpu.sh: torch sees no GPU")' || exit 1
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,temperature.gpu --format=csv
    fi
fi
if wanted tests; then
    FACTS=$(facts)
    tests kernels -q -m "not slow" tests/test_kernels*.py
fi
if [[ -n ${FRESH:-} ]]; then
    for name in $ONLY; do rm -f "$OUT/$name-$DEVICE.json"; done
fi
benchmarks 1
if wanted tests; then
    tests gpu -q -m gpu tests
fi
benchmarks ""

if ((${#failed[@]})); then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
if ((${#left[@]})); then
    printf 'LEFT for the next call: %s\n' "${left[@]}"
    exit 3
fi
