#!/usr/bin/env bash
# What each image installs, and what a node without containers needs.
#   docker/install.sh all generate                      into the virtual environment that is active
#   docker/install.sh dependencies train ENV/bin/python into another one
set -euo pipefail

usage="usage: docker/install.sh dependencies|project|all generate|train|test [PYTHON [OPTION OF PIP ...]]"
step="${1:?$usage}" target="${2:?$usage}" python="${3:-python}"
project="$(cd "$(dirname "$0")/.." && pwd)"

case "$target" in
    generate) extras=generate,text,aws ;;
    train) extras=train,evaluate,lora,text ;;
    test) extras=test,aws ;;
    *) echo "$usage" >&2 && exit 2 ;;
esac

options=("${@:4}")

pip() { PYTHONWARNINGS=ignore "$python" -m pip install --quiet --disable-pip-version-check "${options[@]}" "$@"; }

# Apart from the sources, so that an image whose sources changed takes gigabytes of wheels from an older layer.
dependencies() {
    local shell
    shell="$(mktemp -d)"
    cp "$project/pyproject.toml" "$project/LICENSE" "$shell"
    touch "$shell/README.md" # pyproject.toml names it
    pip --constraint "$project/constraints.txt" "${shell}[$extras]"
    rm -r "$shell"
}

sources() {
    local how=()
    [ "$target" != test ] || how=(--editable) # tests run the files that they lie beside
    pip --no-deps --force-reinstall "${how[@]}" "$project"
}

case "$step" in
    dependencies) dependencies ;;
    project) sources ;;
    all) dependencies && sources ;;
    *) echo "$usage" >&2 && exit 2 ;;
esac
