#!/usr/bin/env bash
# Everything that a GPU decides, within 9 minutes, into one folder of text and JSON:
#
#     bench/gpu_report.sh [--dry] [FOLDER]        FOLDER: gpu_report by default; new or empty
#
# --dry runs the same steps without a GPU, tiny, to see that they run: it measures nothing. Of the
# tests it runs those of the losses alone, and collects the others.
# PYTHON names the interpreter, python3 by default; it has the extras `bench` and `test`. Nothing is
# downloaded: on a machine without a network, what is missing there comes from wheels that were
# carried to it,
#     pip install --no-index --no-deps --find-links WHEELS datasets dill multiprocess trl ...
# With '.[bench,test]' pip would want a wheel of everything, a numpy below 2.4, which Triton's
# interpreter alone needs, and setuptools to build with. Triton wants a C compiler and
# Python's headers.
# What is not installed is named first. A step that fails or outlasts its limit is named in
# summary.txt, and the others still run; without datasets the whole training steps are left out.
set -uo pipefail
cd "$(dirname "$0")/.."
DRY=""
if [[ "${1:-}" == --dry ]]; then DRY=1; shift; fi
OUT="${1:-gpu_report}"
PYTHON="${PYTHON:-python3}"
TOTAL_S="${TOTAL_S:-540}"
KILL_S="${KILL_S:-15}"  # for an interrupted step to write down what it has
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1  # what a killed step had printed is in its file
GPUS="${CUDA_VISIBLE_DEVICES-0}"
export CUDA_VISIBLE_DEVICES="${GPUS%%,*}"  # of several the first: a trainer in one process refuses more
if [[ -e "$OUT" && ( ! -d "$OUT" || -n "$(ls -A "$OUT")" ) ]]; then
    echo "want a new folder, or an empty one, $OUT is there" >&2
    exit 2
fi
mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd)"
SUMMARY="$OUT/summary.txt"
if ! command -v "$PYTHON" > /dev/null; then
    echo "want PYTHON as an interpreter, $PYTHON is not there" | tee "$SUMMARY" >&2
    exit 2
fi
if [[ -z "$DRY" ]] && ! "$PYTHON" -c "import torch; exit(not torch.cuda.is_available())"; then
    echo "want a GPU that torch of $PYTHON sees, got none (--dry runs without)" | tee "$SUMMARY" >&2
    exit 2
fi

{
    echo "commit $(git describe --always --dirty 2>/dev/null || echo unknown)${DRY:+, a dry run without a GPU}"
    "$PYTHON" -c "
from importlib.util import find_spec
wanted = 'torch triton transformers peft accelerate datasets pytest pytest_benchmark hypothesis'
wanted += ' trl liger_kernel cut_cross_entropy'
missing = [name for name in wanted.split() if find_spec(name) is None]
print('not installed:', ', '.join(missing) or 'nothing that is wanted')"
    "$PYTHON" -c "
import sys, torch, triton, transformers
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ['no GPU']
print(f'{names}, CUDA {torch.version.cuda}, Python {sys.version.split()[0]}')
print(f'torch {torch.__version__}, triton {triton.__version__}, transformers {transformers.__version__}')"
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
} > "$SUMMARY" 2>&1
cat "$SUMMARY"

DUE=$SECONDS  # when the steps so far have used up their limits
# step LIMIT_S NAME COMMAND...: its output goes to NAME.txt, its fate to the summary; it may take
# what those before it left of theirs
step() {
    local limit name="$2" began=$SECONDS left=$((TOTAL_S - KILL_S - SECONDS)) status
    DUE=$((DUE + $1))
    limit=$((DUE - SECONDS))
    shift 2
    if ((limit > left)); then limit=$left; fi
    if [[ -n "$DRY" ]]; then limit=600; fi  # a busy machine is no fault of the steps
    if ((limit <= 0)); then
        echo "$name: left out, no time left" | tee -a "$SUMMARY"
        return
    fi
    # an interrupted pytest still prints the tables it has
    timeout --signal=INT --kill-after="$KILL_S" "$limit" "$@" > "$OUT/$name.txt" 2>&1
    status=$?
    case $status in
        0) status="ok" ;;
        5) status="nothing to run" ;;  # says pytest
        124 | 137) status="cut off at ${limit} s" ;;
        *) status="FAILED ($status)" ;;
    esac
    echo "$name: $status, $((SECONDS - began)) s: $(tail -n 1 "$OUT/$name.txt")" | tee -a "$SUMMARY"
}

PYTEST=("$PYTHON" -m pytest -q -rs -p bench.without_datasets --continue-on-collection-errors)
# LIMIT_S NAME FILE CASES [TEST]: the tables in NAME.txt; a dry run takes the tiny cases instead
bench() {
    local filter=(-k "$4${5:+ and $5}")
    if [[ -n "$DRY" ]]; then filter=(-m "not slow" -k "${5:-}"); fi
    step "$1" "$2" "${PYTEST[@]}" --benchmark-json "$OUT/$2.json" "bench/$3" "${filter[@]}"
}

# with a few seconds for the start, the limits add up to what there is
TESTS=(tests/test_cuda.py tests/test_linear_logps.py tests/test_second_product.py
    tests/test_row_statistics.py tests/test_pair_loss.py)  # the last compiles the most kernels
if [[ -n "$DRY" ]]; then
    step 0 collected "${PYTEST[@]}" --collect-only "${TESTS[@]}"
    TESTS=(tests/test_losses.py)
fi
# compiling is most of it
SIDE_BY_SIDE=()
if "$PYTHON" -c "import xdist" 2>/dev/null; then SIDE_BY_SIDE=(--numprocesses 8 --dist worksteal); fi
step 130 tests "${PYTEST[@]}" "${SIDE_BY_SIDE[@]}" "${TESTS[@]}"
bench 100 linear_logps bench_linear_logps.py "8B"
bench 110 train_step bench_train_step.py "chat and lora" test_train_step
step 25 profile "$PYTHON" -m bench.profile_step ${DRY:+--profile tiny} --trace "$OUT/trace.json.gz"
bench 50 layouts bench_layouts.py "long"
bench 20 attention bench_attention.py "8B and (full or long)"
bench 20 pair_loss bench_pair_loss.py "64"
bench 25 gradient_filter bench_gradient_filter.py "8B"
bench 35 precomputed bench_train_step.py "chat and lora" test_precomputed
bench 10 large_model bench_train_step.py "chat" test_large_model  # and what the others leave
