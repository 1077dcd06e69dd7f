#!/usr/bin/env bash
# On a machine with a CUDA GPU: builds, runs every test that needs the GPU, then the GPU benchmarks with their peers.
#
#     benchmarks/gpu.sh OUTDIR        (PYTHON=python3 by default)
#
# Takes less than 9 minutes: each part has a limit of its own, and what fails or is stopped does not stop the rest.
# Needs Python 3.11 or 3.12, torch with CUDA, Triton, pytest, pytest-benchmark, hypothesis and pybind11; no network.
# OUTDIR gets a log for each part, the JSON of each benchmark, table.md and summary.txt.
# Exit code: 0 all parts passed, 1 one did not, 2 wrong use or no GPU.
set -uo pipefail

if [ $# -ne 1 ]; then
    echo "usage: benchmarks/gpu.sh OUTDIR" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
PYTHON=${PYTHON:-python3}

if ! "$PYTHON" -c 'import torch' 2>/dev/null; then
    echo "$PYTHON cannot import torch; PYTHON names the interpreter to use" >&2
    exit 2
fi
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no GPU: torch ($PYTHON) sees no CUDA device, and there is nothing to measure here" >&2
    exit 2
fi

# What is imported is a copy: the repository has the kernels elsewhere, and nothing is left behind in it.
SITE=$OUT/site
rm -rf "$SITE"
mkdir -p "$SITE"
cp -r bmsn "$SITE/bmsn"
cp -r kernels/triton "$SITE/bmsn/kernels"
export PYTHONPATH=$SITE PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=$OUT/triton TORCHINDUCTOR_CACHE_DIR=$OUT/inductor
unset BMSN_BACKEND TRITON_INTERPRET

: >"$OUT/summary.txt"
FAILED=0

say() { echo "$*" | tee -a "$OUT/summary.txt"; }

# part NAME SECONDS COMMAND...: runs it under its limit, its output into NAME.log
part() {
    local name=$1 limit=$2 started=$SECONDS code=0
    shift 2
    timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1 || code=$?
    local taken="$((SECONDS - started)) s of $limit"
    case $code in
        0) say "$(printf '%-18s passed     %s' "$name" "$taken")" ;;
        5) say "$(printf '%-18s nothing there to run' "$name")" ;; # pytest's code for no tests
        *)
            [ "$code" -eq 124 ] && code="124, out of time"
            say "$(printf '%-18s FAILED     %s (exit code %s), see %s.log' "$name" "$taken" "$code" "$name")"
            FAILED=$((FAILED + 1))
            ;;
    esac
}

# bench NAME SECONDS FILE [OPTIONS]: its results into NAME.json
BENCHES=()
bench() {
    local name=$1 limit=$2 file=$3
    shift 3
    BENCHES+=("$name")
    rm -f "$OUT/$name.json" # of an earlier run
    part "$name" "$limit" "$PYTHON" -m pytest "benchmarks/bench_$file.py" --benchmark-only -q -s -p no:cacheprovider \
        --benchmark-json="$OUT/$name.json" "$@"
}

say "$("$PYTHON" -c 'import torch, triton, platform
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, "Python", platform.python_version())')"
say "commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"

PARALLEL=()
if "$PYTHON" -c 'import xdist' 2>/dev/null; then PARALLEL=(-n 8); fi

part build 60 env BMSN_BUILD_EXT=1 "$PYTHON" setup.py --quiet build_ext --build-lib "$SITE" --build-temp "$OUT/build"
part tests 145 "$PYTHON" -m pytest tests -q -p no:cacheprovider -k "triton or cuda" "${PARALLEL[@]}" \
    --ignore tests/test_triton_aot.py --ignore tests/test_triton_interpreter.py
bench scoring_half 35 evaluator -k validation_half
bench scoring 60 evaluator -k "not validation_half and not compiled"
bench conv_bn 50 conv_bn
bench bn_add_relu_pool 25 bn_add_relu_pool
bench head 25 head
bench training 40 training -k cuda
bench compiled 75 evaluator -k compiled

for name in "${BENCHES[@]}"; do
    if [ -s "$OUT/$name.json" ]; then "$PYTHON" benchmarks/report.py "$OUT/$name.json"; fi
done >"$OUT/table.md" 2>"$OUT/report.log"
cat "$OUT/table.md"
rm -rf "$SITE" "$OUT/build" "$OUT/triton" "$OUT/inductor"
echo
cat "$OUT/summary.txt"
[ "$FAILED" -eq 0 ]
