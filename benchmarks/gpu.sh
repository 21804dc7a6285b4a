#!/usr/bin/env bash
# bash benchmarks/gpu.sh              checks and measures the program on one CUDA GPU, in at most 8 minutes, offline
# bash benchmarks/gpu.sh --rehearse   the same with small networks on a CPU, to try the script itself
# Each section is a process of its own; one that fails or takes too long is reported and the next one runs.
# $OUT (default: output/gpu) gets log, results.jsonl and table.md; on a GPU, the table in docs/performance.md is replaced.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1
python=${PYTHON:-python3} out=${OUT:-output/gpu} rehearse=${1:-}
if [ -n "$rehearse" ] && [ "$rehearse" != --rehearse ]; then
    echo "gpu.sh: error: unknown argument '$rehearse'; the only one is --rehearse" >&2
    exit 2
fi
if ! "$python" -c "import torch, taming, tqdm" 2>/dev/null; then
    echo "gpu.sh: error: $python lacks what requirements.txt lists; activate the environment that has it, or set PYTHON" >&2
    exit 2
fi
mkdir -p "$out" && : >"$out/results.jsonl" || exit 2
exec > >(tee "$out/log") 2>&1
started=$(date +%s)

section() { # name, seconds at most
    local left=$((475 - $(date +%s) + started)) most=$2
    if [ "$left" -lt 15 ]; then
        "$python" -m benchmarks.gpu "$out" skipped "$1: no time left"
        return
    fi
    [ "$most" -gt "$left" ] && most=$left
    echo "== $1 (at most $most s)"
    timeout -k 5 "$most" "$python" -m benchmarks.gpu "$out" "$1" $rehearse
    local status=$?
    [ "$status" = 0 ] || "$python" -m benchmarks.gpu "$out" skipped "$1: ended early with status $status"
}

section machine 60
section equality 110
section training 140
section generation 110
section demo 120
section vqgan 100
"$python" -m benchmarks.gpu "$out" table $rehearse
