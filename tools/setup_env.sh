#!/bin/sh
# Makes .venv and installs tiny_llm into it, editable: sh tools/setup_env.sh [extra]
# uv does it where there is one; else any Python >= 3.11 that has venv and pip.
# PYTHON=... chooses the Python. Package indexes are whatever uv and pip are configured with.
set -eu
cd "$(dirname "$0")/.."
venv=.venv/bin/python
what=".${1:+[$1]}"

fail() {
    printf '\n%s\n' "$1" >&2
    exit 2
}

# MLX on a Mac needs Apple silicon, and a Python that does not run under Rosetta.
suits() {
    "$1" -c 'import platform, sys
sys.exit(sys.version_info < (3, 11) or (sys.platform == "darwin" and platform.machine() != "arm64"))' \
        >/dev/null 2>&1
}

# What the kernels need to be built lies in .venv too: MLX is there once, the one that they will run
# with, and a second build compiles only what has changed. $1 is the installer.
install() {
    "$venv" -c 'import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' |
        "$1" -r /dev/stdin || return 1
    tools=$("$venv" -c 'from scikit_build_core.build import get_requires_for_build_editable as needs
print(*needs(), sep="\n")') || return 1
    [ -z "$tools" ] || echo "$tools" | "$1" -r /dev/stdin || return 1
    "$1" --no-build-isolation --editable "$what"
}

uv_install() { uv pip install --quiet --python "$venv" "$@"; }
pip_install() { "$venv" -m pip install --quiet --disable-pip-version-check "$@"; }

with_uv() {
    suits "$venv" || uv venv --quiet --clear --python "${PYTHON:->=3.11}" .venv || return 1
    install uv_install
}

find_python() {
    for name in ${PYTHON:-python3 python3.13 python3.12 python3.14 python3.11 python}; do
        if suits "$name"; then
            echo "$name"
            return
        fi
    done
}

with_pip() {
    if ! suits "$venv" || ! "$venv" -m pip --version >/dev/null 2>&1; then
        python=$(find_python)
        [ -n "$python" ] || fail "No Python >= 3.11 found${PYTHON:+ at $PYTHON} (on a Mac: one built for arm64).
Install one (Debian, Ubuntu: apt install python3 python3-venv; macOS: brew install python@3.13),
or uv, which brings its own; or name one: make run PYTHON=/path/to/python3.12"
        "$python" -m venv --clear .venv || fail "'$python -m venv' failed (see above).
On Debian and Ubuntu venv is a package of its own: apt install python3-venv"
    fi
    install pip_install ||
        fail "pip could not install tiny_llm (see above). Without network, point pip at a local index and try again."
}

echo "Setting up .venv and building the kernels (once; some minutes) ..." >&2
if command -v uv >/dev/null 2>&1; then
    with_uv && exit 0
    echo "uv could not do it; trying venv and pip ..." >&2
fi
with_pip
