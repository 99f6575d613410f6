# shellcheck shell=bash
# Sourced by the scripts beside it: threads, memory settings and the virtual environment.
# Works with bash 3.2 and newer.
#
# Settings from outside:
#   PYTHON           the Python to build the environment with
#   XFUSER_VENV      the directory of the virtual environment
#   TORCH_INDEX_URL  package index to take torch from (CPU builds, for example)
#   OMP_NUM_THREADS, MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_

ROOT="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"

say() { printf '== %s\n' "$*"; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Two threads, or one on a machine with one processor.
default_threads() {
    local count
    count="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)"
    if [ "$count" -lt 2 ]; then echo 1; else echo 2; fi
}

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(default_threads)}"
# glibc otherwise gives large tensors back to the system and faults their pages in anew at every allocation.
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-4294967296}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-4294967296}"

suitable_python() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

# Print the command of a usable Python.
find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        suitable_python "$PYTHON" ||
            fail "PYTHON=$PYTHON is not Python 3.10 or newer with a working venv module; set PYTHON to one that is"
        echo "$PYTHON"
        return
    fi
    for candidate in python3.12 python3.11 python3.10 python3; do
        if suitable_python "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.10 or newer with a working venv module found; install one (Debian, Ubuntu: apt install python3-venv) or set PYTHON to its path"
}

python_version() { "$1" -c 'import sys; print(sys.version_info[:2])' 2>/dev/null; }

# True if DIRECTORY's Python runs, has pip, and is of the version that PYTHON asks for.
usable_environment() {
    "$1/bin/python" -m pip --version >/dev/null 2>&1 || return 1
    [ -z "${PYTHON:-}" ] || [ "$(python_version "$PYTHON")" = "$(python_version "$1/bin/python")" ]
}

# What an installation depends on: the two files, what is installed, and where this checkout lies.
environment_hash() {
    "$1" - "$2" "$ROOT" "$ROOT/setup.py" "$ROOT/constraints.txt" <<'EOF'
import hashlib, sys

digest = hashlib.sha256(repr(sys.argv[1:3]).encode())
for path in sys.argv[3:]:
    with open(path, "rb") as file:
        digest.update(hashlib.sha256(file.read()).digest())
print(digest.hexdigest())
EOF
}

# prepare_environment DIRECTORY REQUIREMENT
# Sets VENV_PYTHON. The stamp is written last, so an interrupted installation is taken up again.
prepare_environment() {
    local directory="$1" requirement="$2" python stamp wanted
    case "$directory" in /*) ;; *) directory="$PWD/$directory" ;; esac
    VENV_PYTHON="$directory/bin/python"
    stamp="$directory/.xfuser-stamp"

    if [ -f "$stamp" ] && usable_environment "$directory" &&
        wanted="$(environment_hash "$VENV_PYTHON" "$requirement" 2>/dev/null)" && [ "$(cat "$stamp")" = "$wanted" ]; then
        say "environment: $directory (ready)"
        return
    fi

    if [ -e "$directory" ] && [ ! -f "$directory/pyvenv.cfg" ] && [ -n "$(ls -A "$directory" 2>/dev/null)" ]; then
        fail "$directory exists and is not a virtual environment; remove it or set XFUSER_VENV to another directory"
    fi
    if ! usable_environment "$directory"; then
        python="$(find_python)"
        say "environment: creating $directory with $("$python" --version 2>&1)"
        "$python" -m venv --clear "$directory" ||
            fail "$python could not create $directory; check the directory is writable or set PYTHON or XFUSER_VENV"
    fi

    rm -f -- "$stamp"
    say "environment: installing into $directory (several minutes the first time)"
    if [ -n "${TORCH_INDEX_URL:-}" ]; then
        run_pip --index-url "$TORCH_INDEX_URL" torch
    fi
    (cd -- "$ROOT" && run_pip -e "$requirement")
    environment_hash "$VENV_PYTHON" "$requirement" >"$stamp.new"
    mv -f -- "$stamp.new" "$stamp"
}

run_pip() {
    "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check -c "$ROOT/constraints.txt" "$@" ||
        fail "installation failed (see pip's message above); run the same command again to continue"
}
