#!/usr/bin/env bash
# What an owner of N GPUs runs first: bash scripts/gpu_check.sh [arguments of benchmark/gpu_check.py]
# Without a GPU: bash scripts/gpu_check.sh --device cpu
# Sets up its own environment in .venv (or XFUSER_VENV); other settings: scripts/environment.sh.
set -euo pipefail
# shellcheck source=scripts/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment "${XFUSER_VENV:-$ROOT/.venv}" "."
cd -- "$ROOT"
exec "$VENV_PYTHON" benchmark/gpu_check.py "$@"
