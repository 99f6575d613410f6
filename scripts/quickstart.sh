#!/usr/bin/env bash
# Compare the caching methods on the shipped model: bash scripts/quickstart.sh [arguments of benchmark/cache_execute.py]
# Sets up its own environment in .venv (or XFUSER_VENV); other settings: scripts/environment.sh.
set -euo pipefail
# shellcheck source=scripts/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment "${XFUSER_VENV:-$ROOT/.venv}" "."
cd -- "$ROOT"

# The last --output_dir counts, as it does for the benchmark.
output=cache_execute_results
previous=
for argument in "$@"; do
    case "$previous" in --output_dir) output="$argument" ;; esac
    case "$argument" in
        --output_dir=*) output="${argument#*=}" ;;
        -h | --help) exec "$VENV_PYTHON" benchmark/cache_execute.py --help ;;
    esac
    previous="$argument"
done

say "benchmark with OMP_NUM_THREADS=$OMP_NUM_THREADS"
"$VENV_PYTHON" benchmark/cache_execute.py --model_type tiny-dit --cache_methods Tea+AdaCorrection Fb+AdaCorrection \
    --output_dir cache_execute_results "$@"

case "$output" in /*) ;; *) output="$ROOT/$output" ;; esac
[ -f "$output/report.html" ] || fail "the benchmark ended without $output/report.html; see its messages above"
say "report: $output/report.html"
