#!/usr/bin/env bash
# What to run first on a GPU, in the order of what must not be missing when it ends early.
#
#   bench/first_gpu_run.sh OUT [PART ...]      # PART: probe tests ours step profile tune peers shapes
#   REHEARSE=1 bench/first_gpu_run.sh OUT      # the same on a CPU with small shapes
#
# Every part ends after LIMIT seconds (540) at the latest, leaves OUT/PART.log and, when it is
# through, OUT/PART.done, with which it is skipped the next time; one that fails does not stop the
# others. Rows: OUT/*.jsonl.
# PYTHON names the interpreter (default: python3). Windows of measurement are shorter than elsewhere
# (ES2FAST_BENCH_WINDOW_MS); without deepspeed and pydantic the kernels' parts run all the same.
set -u
OUT=${1:?usage: bench/first_gpu_run.sh OUT [PART ...]}
shift
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) && cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-540}
export ES2FAST_BENCH_WARMUP_MS=${ES2FAST_BENCH_WARMUP_MS:-200}
export ES2FAST_BENCH_WINDOW_MS=${ES2FAST_BENCH_WINDOW_MS:-800}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
main=(--shape 8192 4096 128256)
others=(--mode trainable frozen)
probe=()
step=(--shape 8b --dtype bf16 --rows 8)
tests=(-n 8)
if [ "${REHEARSE:-0}" = 1 ]; then
  main=(--device cpu --shape 16 16 50)
  others+=(--device cpu --quick)
  probe=(--device cpu --quick)
  step=(--device cpu --quick --dtype fp32)
  tests=()
fi
"$PYTHON" -c 'import pytest_timeout' 2>/dev/null && tests+=(--timeout=120)

PARTS="probe tests ours step profile tune peers shapes"

set_arguments() {
  case $1 in
    probe) arguments=(bench/gpu_probe.py gemms "${probe[@]}" --out "$OUT") ;;
    tests) arguments=(-m pytest tests/gpu -q -p no:cacheprovider --continue-on-collection-errors "${tests[@]}") ;;
    ours) arguments=(bench/linear_kl.py "${main[@]}" --only es2fast --out "$OUT") ;;
    step) arguments=(bench/step.py "${step[@]}" --only plain-lora es2fast-lora-cache
                     --out "$OUT/step.jsonl") ;;
    profile) arguments=(bench/gpu_probe.py profile "${probe[@]}" --out "$OUT") ;;
    tune) arguments=(bench/gpu_probe.py tune "${probe[@]}" --out "$OUT") ;;
    peers) arguments=(bench/linear_kl.py "${main[@]}" --skip es2fast GEMMs --out "$OUT") ;;
    shapes) arguments=(bench/linear_kl.py "${others[@]}" --only es2fast --out "$OUT") ;;
    *) echo "no part $1: expected some of $PARTS" >&2; exit 2 ;;
  esac
}

[ $# -gt 0 ] || set -- $PARTS
status=0
for part in "$@"; do
  set_arguments "$part"
  if [ -e "$OUT/$part.done" ]; then
    echo "$part: done before"
    continue
  fi
  started=$SECONDS
  timeout -k 10 "$LIMIT" "$PYTHON" "${arguments[@]}" >"$OUT/$part.log" 2>&1
  code=$?
  echo "$part: status $code after $((SECONDS - started)) s"
  if [ $code = 0 ]; then touch "$OUT/$part.done"; else status=1; tail -n 3 "$OUT/$part.log"; fi
done
exit $status
