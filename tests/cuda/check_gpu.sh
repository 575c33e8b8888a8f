#!/bin/sh
# What only a machine with an NVIDIA GPU can show. Usage: tests/cuda/check_gpu.sh BUILD_DIRECTORY
# Job:        ops, goldens and what holds on a device, on the GPU; compute-sanitizer where it is installed; speed.
# Input:      the plug-in and the tests, built by "make check-gpu"; MODEL=DIR a checkpoint to time (default: the bundled one).
# Output:     BUILD_DIRECTORY/gpu-report.md, to be sent with an issue; exit status 1 when a check failed, 77 without a GPU.
set -u
cd "$(dirname "$0")/../.."
b=$1
report=$b/gpu-report.md
log=$b/gpu-step.log
python=${PYTHON:-python3}
export QVL_CUDA_PLUGIN="$PWD/$b/libqvl-cuda.so" QVL_LIBRARY="$PWD/$b/libqvl.so" PYTHONPATH="$PWD/bindings/python" QVL_TEST_DEVICE=cuda
nvidia-smi -L >/dev/null 2>&1 || { echo "check-gpu: no NVIDIA GPU here (nvidia-smi -L finds none); nothing was checked" >&2; exit 77; }
failed=0
{
    echo "# libqvl on a GPU"
    echo
    echo "- commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), $(date -u +%Y-%m-%d)"
    nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv,noheader | sed 's/^/- GPU: /'
    echo "- $(nvcc --version 2>/dev/null | tail -n 1 || true)"
    echo
    echo "| check | result | seconds |"
    echo "|---|---|---|"
} >"$report"
step() { # name, command...
    name=$1
    shift
    echo "check-gpu: $name" >&2
    start=$(date +%s)
    if "$@" >"$log" 2>&1; then result=passed; else result="**failed**"; failed=1; tail -n 30 "$log" >&2; fi
    echo "| $name | $result | $(($(date +%s) - start)) |" >>"$report"
}
for mode in exact deterministic fast; do step "ops, $mode" "$b/tests/ops/cuda_ops" $mode; done
step "goldens" "$python" -m pytest -q -p no:cacheprovider tests/python/test_goldens.py tests/python/test_moe.py tests/python/test_fp8.py
step "device" "$python" -m pytest -q -p no:cacheprovider tests/python/test_device.py
if command -v compute-sanitizer >/dev/null 2>&1; then
    for tool in memcheck racecheck synccheck; do
        for one in "exact test_norms" "deterministic test_vision" "fast same_decoding"; do
            # shellcheck disable=SC2086 # mode and test are two words
            step "compute-sanitizer $tool, $one" compute-sanitizer --tool "$tool" --error-exitcode 9 "$b/tests/ops/cuda_ops" $one
        done
    done
else
    echo "| compute-sanitizer | not installed | |" >>"$report"
fi
for dtype in bf16 int8 int4; do
    echo "check-gpu: bench $dtype" >&2
    {
        echo
        echo "## qvl bench, dtype $dtype"
        echo '```'
        "$b/qvl" bench ${MODEL:+-m "$MODEL"} --device cuda --dtype $dtype 2>&1
        echo '```'
    } >>"$report"
done
cat "$report"
echo "check-gpu: the report is $report" >&2
exit $failed
