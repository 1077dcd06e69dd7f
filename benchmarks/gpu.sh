#!/usr/bin/env bash
# On a machine with a CUDA GPU: builds, runs every test that needs the GPU, then the GPU benchmarks with their peers.
#
#     benchmarks/gpu.sh OUTDIR        (PYTHON=python3 by default)
#
# Takes less than 9 minutes: each part has a limit of its own, all of them have one together, and what fails or is
# stopped does not stop the rest.
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
SECONDS=0 TOTAL=520 # what is killed, and the table, take some more

if ! "$PYTHON" -c 'import torch' 2>/dev/null; then
    echo "$PYTHON cannot import torch; PYTHON names the interpreter to use" >&2
    exit 2
fi
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no GPU: torch ($PYTHON) sees no CUDA device, and there is nothing to measure here" >&2
    exit 2
fi
if ! "$PYTHON" -c 'import triton' 2>/dev/null; then
    echo "$PYTHON cannot import triton: no kernel would run" >&2
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
    [ "$limit" -le $((TOTAL - started)) ] || limit=$((TOTAL - started))
    if [ "$limit" -gt 0 ]; then
        timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1 || code=$?
    else
        limit=0 code=124
    fi
    local taken="$((SECONDS - started)) s of $limit"
    if [ "$code" -eq 0 ]; then
        say "$(printf '%-18s passed     %s' "$name" "$taken")"
        return 0
    fi
    [ "$code" -ne 124 ] || code="124, out of time"
    [ "$code" != 5 ] || code="5, nothing there to run"
    say "$(printf '%-18s FAILED     %s (exit code %s), see %s.log' "$name" "$taken" "$code" "$name")"
    FAILED=$((FAILED + 1))
    return 1
}

# bench NAME SECONDS FILE [OPTIONS]: its results into NAME.json
BENCHES=()
bench() {
    local name=$1 limit=$2 file=$3
    shift 3
    BENCHES+=("$name")
    rm -f "$OUT/$name.json" # of an earlier run
    part "$name" "$limit" "$PYTHON" -m pytest "benchmarks/bench_$file.py" --benchmark-only -q -s -p no:cacheprovider \
        --benchmark-json="$OUT/$name.json" "$@" || return
    if [ ! -s "$OUT/$name.json" ]; then
        say "$(printf '%-18s FAILED     everything was skipped, see %s.log' "$name" "$name")"
        FAILED=$((FAILED + 1))
    fi
}

say "$("$PYTHON" -c 'import torch, triton, platform
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, "Python", platform.python_version())')"
say "commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"

part build 60 env BMSN_BUILD_EXT=1 "$PYTHON" setup.py --quiet build_ext --build-lib "$SITE" --build-temp "$OUT/build"

# A process a file, eight at a time: compiling kernels is what takes the time.
TESTS=(conv_bn norm_relu_triton engine_gpu evaluator affine_norm_relu bn_add_relu_pool mixture_step conv_scale head
    batches cross_entropy sgd)
# shellcheck disable=SC2016
part tests 130 xargs -P 8 -I {} sh -c '"$0" -m pytest tests/test_{}.py -q -p no:cacheprovider \
    -k "triton or cuda or gpu" >"$1/tests_{}.log" 2>&1' "$PYTHON" "$OUT" < <(printf '%s\n' "${TESTS[@]}")
cat "$OUT"/tests_*.log >>"$OUT/tests.log"
rm -f "$OUT"/tests_*.log

bench scoring_half 35 evaluator -k validation_half
bench scoring 110 evaluator -k "test_scoring and not validation_half and not large and not 560" # six compile
bench conv_bn 50 conv_bn
part choice 30 "$PYTHON" -m pytest benchmarks/bench_conv_bn.py -k ours_against -q -s -p no:cacheprovider
bench conv_scale 25 conv_scale
bench bn_add_relu_pool 25 bn_add_relu_pool
bench head 20 head
bench batches 20 batches -k gpu
bench balance 25 balance -k gpu
bench training 120 training
bench scoring_1024 100 evaluator --full -k large_batches
bench scoring_560 60 evaluator --full -k 560

for name in "${BENCHES[@]}"; do
    if [ -s "$OUT/$name.json" ]; then "$PYTHON" benchmarks/report.py "$OUT/$name.json"; fi
done >"$OUT/table.md" 2>"$OUT/report.log"
cat "$OUT/table.md"
rm -rf "$SITE" "$OUT/build" "$OUT/triton" "$OUT/inductor"
echo
cat "$OUT/summary.txt"
[ "$FAILED" -eq 0 ]
