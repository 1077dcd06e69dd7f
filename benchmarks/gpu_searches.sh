#!/usr/bin/env bash
# On a machine with a CUDA GPU: the full searches on CIFAR-10 with their ground truth, and a profile; goes on when called
# again with the same arguments.
#
#     benchmarks/gpu_searches.sh DATA OUTDIR [MINUTES]        (MINUTES=9; DATA as --data takes it, cifar10:DIR)
#
# Order: profile of the graph engine (OUTDIR/profile.json, profile.log); searches of SPACE (resnet20-cifar10) with each
# seed of SEEDS ("0 1 2") for each M of SUPERNETS ("1 2 4 8") in OUTDIR/runs, against the paper's truth, the ranking along
# training every SCORE_EPOCHS (5) times M epochs; SPACE's ground truth, one seed, in OUTDIR/truth. When all is there and
# matplotlib is: report_paper.html and report_own.html, against each of the two. Before MINUTES are over whatever runs
# gets SIGTERM, saves its state, and the next call goes on with it. OUTDIR/summary.txt has a line for each part run.
# SEARCH_FLAGS and TRUTH_FLAGS are added to each command, TRUTH (paper) is what searches are compared with, DEVICE
# (cuda) may be cpu, then without the profile; PYTHON=python3, with torch, Triton and pybind11.
# Exit code: 0 all is done, 1 a part failed, 2 wrong use or no GPU, 3 time is over: call again.
set -uo pipefail

if [ $# -lt 2 ] || [ $# -gt 3 ] || ! [[ ${3:-9} =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: benchmarks/gpu_searches.sh DATA OUTDIR [MINUTES]" >&2
    exit 2
fi
DATA=$1
mkdir -p "$2" || exit 2
OUT=$(cd "$2" && pwd)
STOP=$((${3:-9} * 60 - 25)) # seconds: what stops has 20 left to save its state
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda} SPACE=${SPACE:-resnet20-cifar10} TRUTH=${TRUTH:-paper}
read -ra SEEDS <<<"${SEEDS:-0 1 2}"
read -ra SUPERNETS <<<"${SUPERNETS:-1 2 4 8}"
read -ra SEARCH_FLAGS <<<"${SEARCH_FLAGS:-}"
read -ra TRUTH_FLAGS <<<"${TRUTH_FLAGS:-}"

if [ "$DEVICE" = cuda ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no GPU: torch ($PYTHON) sees no CUDA device" >&2
    exit 2
fi

say() { echo "$*" | tee -a "$OUT/summary.txt"; }

# What is imported is a copy, with the kernels where they belong; made anew where the sources have changed.
SITE=$OUT/site
export PYTHONPATH=$SITE PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=$OUT/triton
unset BMSN_BACKEND TRITON_INTERPRET
SOURCES=$(find bmsn kernels csrc setup.py -type f ! -name '*.pyc' ! -name '*.so' -exec sha256sum {} + | sort | sha256sum)
if [ "$(cat "$SITE/sources" 2>/dev/null)" != "$SOURCES" ]; then
    rm -rf "$SITE"
    mkdir -p "$SITE"
    cp -r bmsn "$SITE/bmsn"
    cp -r kernels/triton "$SITE/bmsn/kernels"
    if ! BMSN_BUILD_EXT=1 "$PYTHON" setup.py --quiet build_ext --build-lib "$SITE" --build-temp "$OUT/build" \
        >"$OUT/build.log" 2>&1; then
        say "build FAILED, see build.log"
        exit 1
    fi
    echo "$SOURCES" >"$SITE/sources"
fi

FAILED=0

# part NAME COMMAND...: runs it until the time is over, its output at the end of NAME.log; where it is over, exits
part() {
    local name=$1 code=0 started=$SECONDS
    shift
    if [ $((STOP - SECONDS)) -lt 10 ]; then
        say "time is over before $name; call again"
        exit 3
    fi
    # --foreground: the signal is for the command alone, which ends its workers itself
    timeout --foreground --preserve-status --kill-after=20 $((STOP - SECONDS)) "$@" >>"$OUT/$name.log" 2>&1 || code=$?
    case $code in
        0) say "$name: done, $((SECONDS - started)) s in this call" ;;
        143)
            say "$name: stopped after $((SECONDS - started)) s, its state is saved; call again"
            exit 3
            ;;
        *)
            say "$name: FAILED (exit code $code), see $name.log"
            FAILED=$((FAILED + 1))
            ;;
    esac
}

if [ "$DEVICE" = cuda ] && [ ! -s "$OUT/profile.json" ]; then
    part profile env PYTHONPATH="$SITE:$PWD/benchmarks" "$PYTHON" benchmarks/gpu_profile.py "$OUT/profile.json"
    tail -n 1 "$OUT/profile.log"
fi

RUNS=()
for seed in "${SEEDS[@]}"; do
    for supernets in "${SUPERNETS[@]}"; do
        name=m$supernets-seed$seed
        run=$OUT/runs/$name
        RUNS+=("$run")
        [ -s "$run/result.json" ] && continue
        resume=()
        [ -f "$run/config.yaml" ] && resume=(--resume)
        part "$name" "$PYTHON" -m bmsn.search --space "$SPACE" --data "$DATA" --supernets "$supernets" --seed "$seed" \
            --truth "$TRUTH" --score-every $((${SCORE_EPOCHS:-5} * supernets)) --fast-eval --device "$DEVICE" \
            "${SEARCH_FLAGS[@]}" --out "$run" "${resume[@]}"
    done
done

if [ ! -s "$OUT/truth/ground_truth.csv" ]; then
    part truth "$PYTHON" -m bmsn.ground_truth --space "$SPACE" --data "$DATA" --seeds 1 --device "$DEVICE" \
        "${TRUTH_FLAGS[@]}" --out "$OUT/truth"
fi

if [ "$FAILED" -eq 0 ] && "$PYTHON" -c 'import matplotlib' 2>/dev/null; then
    part report_paper "$PYTHON" -m bmsn.report "${RUNS[@]}" --truth "$TRUTH" --out "$OUT/report_paper.html"
    part report_own "$PYTHON" -m bmsn.report "${RUNS[@]}" --truth "$OUT/truth/ground_truth.csv" \
        --out "$OUT/report_own.html"
fi
[ "$FAILED" -eq 0 ]
