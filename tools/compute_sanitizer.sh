#!/usr/bin/env bash
# Small operator tests of the GPU backends under NVIDIA's Compute Sanitizer.
#
#   tools/compute_sanitizer.sh                      # memcheck racecheck synccheck initcheck
#   tools/compute_sanitizer.sh memcheck initcheck   # only these
#
# PYTHON names the interpreter (.venv/bin/python if there is one, else python3); CUDA_HOME the
# toolkit, where compute-sanitizer is not in PATH. Exit status: 0 all is clean, 1 a tool reported an
# error or a test failed, 2 nothing could be run.
set -uo pipefail
cd "$(dirname "$0")/.."

stop() {
  echo "compute_sanitizer.sh: $*" >&2
  exit 2
}

tools=("$@")
[ $# -gt 0 ] || tools=(memcheck racecheck synccheck initcheck)
for tool in "${tools[@]}"; do
  case $tool in
    memcheck | racecheck | synccheck | initcheck) ;;
    *) stop "expected memcheck, racecheck, synccheck or initcheck, got $tool" ;;
  esac
done

sanitizer=$(command -v compute-sanitizer) \
  || sanitizer=${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer
[ -x "$sanitizer" ] || stop "there is no compute-sanitizer in PATH, nor $sanitizer (set CUDA_HOME)"
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1
"$python" - <<'END' || stop "nothing to check with $python"
import sys

import torch

from rlhf_kernels.backend import why_not

if not torch.cuda.is_available():
    sys.exit("there is no GPU")
missing = {name: why_not("token_logprob", name) for name in ("triton", "cuda")}
for name, reason in missing.items():
    if reason:
        print(f"backend {name} is not checked: {reason}")
sys.exit(all(missing.values()))
END

failed=()
for tool in "${tools[@]}"; do
  # All samples of all operators in two dtypes: every vector width but one, and both accumulators.
  tests=(tests/test_ops.py tests/test_token_logprob.py tests/test_token_logprob_and_grad.py)
  select="(test_error_is_at_most and (bfloat16 or float64)) or in_place or inplace or ignored_rows"
  select+=" or surrogate"
  if [ "$tool" = initcheck ]; then
    # Only dense tensors: a clone of padded rows by PyTorch would count as a read of the gaps.
    tests=(tests)
    select="by_hand"
  fi
  options=(--tool "$tool" --error-exitcode 1 --print-limit 20)
  # What PyTorch and Triton ask the driver may fail without harm; a failed launch raises anyway.
  [ "$tool" = memcheck ] && options+=(--report-api-errors no)
  environment=()
  case $tool in # each tensor an allocation of its own: a read beside it is outside, or unwritten
    memcheck | initcheck) environment=(PYTORCH_NO_CUDA_MEMORY_CACHING=1) ;;
  esac
  echo "== $tool"
  # No filter by kernel: initcheck would take for unwritten what PyTorch's kernels wrote.
  # racecheck looks at shared memory only.
  env ${environment[@]+"${environment[@]}"} "$sanitizer" "${options[@]}" \
    "$python" -m pytest "${tests[@]}" --ignore=tests/trainer -q -rs -p no:cacheprovider \
    -k "(cuda-triton or cuda-cuda) and ($select)" || failed+=("$tool")
done

if [ ${#failed[@]} -gt 0 ]; then
  echo "errors under: ${failed[*]}"
  exit 1
fi
echo "clean under: ${tools[*]}"
