#!/usr/bin/env bash
# Lint and test: bash scripts/test.sh [pytest arguments]
# Sets up its own environment in .venv-test (or XFUSER_VENV); other settings: scripts/environment.sh.
set -euo pipefail
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # two files run at a time
# shellcheck source=scripts/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment "${XFUSER_VENV:-$ROOT/.venv-test}" ".[test]"
cd -- "$ROOT"

say "ruff check"
"$VENV_PYTHON" -m ruff check .
say "ruff format --check"
"$VENV_PYTHON" -m ruff format --check .
say "lint-imports"
"$(dirname -- "$VENV_PYTHON")/lint-imports" --no-cache >/dev/null || "$(dirname -- "$VENV_PYTHON")/lint-imports" --no-cache
say "pytest with OMP_NUM_THREADS=$OMP_NUM_THREADS, two files at a time"
"$VENV_PYTHON" -m pytest -n 2 --dist loadfile "$@"
