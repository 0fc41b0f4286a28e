#!/bin/sh
# make book, make book-serve: the book's own environment (once), files from npm (once), then zensical.
# zensical needs packages that the runtime does not; they lie in build/book-env, pinned by hash.
set -eu
cd "$(dirname "$0")/.."
env=build/book-env

if ! cmp -s book/requirements.txt "$env/requirements.txt"; then
    echo "Setting up $env ..." >&2
    rm -rf "$env"
    if command -v uv >/dev/null 2>&1; then
        uv venv --quiet --python "${PYTHON:->=3.11}" "$env"
        uv pip install --quiet --python "$env/bin/python" --require-hashes -r book/requirements.txt
    else
        "${PYTHON:-$(command -v .venv/bin/python || command -v python3)}" -m venv "$env"
        "$env/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r book/requirements.txt
    fi
    cp book/requirements.txt "$env/requirements.txt"
fi
"$env/bin/python" book/vendor.py
case ${1:-build} in
build)
    "$env/bin/zensical" build --clean --strict -f book/mkdocs.yml
    echo "Open book/site/index.html in a browser."
    ;;
serve) exec "$env/bin/zensical" serve -f book/mkdocs.yml ;;
esac
