#!/usr/bin/env bash
# Everything that needs a GPU, in one go: tests, then benchmarks. Run from anywhere; no network.
#
#   benchmarks/gpu.sh                      # results into benchmarks/results
#   OUT=/tmp/results benchmarks/gpu.sh     # somewhere else
#   SMALL=1 benchmarks/gpu.sh              # does it work at all? a few minutes
#   ONLY="tests prediction" benchmarks/gpu.sh
#
# PYTHON names the interpreter. Every step runs whatever became of those before it; the exit status is 1 if one failed. Each
# row of a JSON file holds the GPU, the date and the versions, and the file is rewritten after each case: what a time limit
# cuts off has lost its last case only.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results}
PYTHON=${PYTHON:-python}
ONLY=${ONLY:-tests prediction attention step step-attention}
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT"
failed=()

wanted() { [[ " $ONLY " == *" $1 "* ]]; }

tests() { # no tests collected (status 5) is no failure
    "$PYTHON" -m pytest "$@"
    local status=$?
    [[ $status -eq 0 || $status -eq 5 ]] || failed+=("pytest $*")
}

benchmark() { # NAME SCRIPT OPTIONS...
    local name=$1 script=$2
    shift 2
    wanted "$name" || return 0
    echo "== $name"
    "$PYTHON" "benchmarks/$script.py" --device cuda ${SMALL:+--small} --json "$OUT/$name-cuda.json" "$@" 2>"$OUT/$name-cuda.log" ||
        failed+=("$name (see $OUT/$name-cuda.log)")
}

"$PYTHON" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "gpu.sh: torch sees no GPU")' || exit 1
if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,temperature.gpu --format=csv
fi
if wanted tests; then
    tests -m "not slow" tests/test_kernels*.py
    tests -m gpu tests
fi
benchmark prediction prediction
benchmark attention attention
benchmark step step
benchmark step-attention step --attention-weight 1

if ((${#failed[@]})); then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
