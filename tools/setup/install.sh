#!/usr/bin/env bash
# Install the project and its dependencies: install.sh PYTHON REQUIREMENT
#
# uv needs half the time of pip for the several gigabytes of torch. It does not read pip's settings,
# so pip installs where an own index is set, and where uv fails.
set -euo pipefail
python=$1 requirement=$2
# The statistics are a distribution of their own, which no index has.
what=(--editable plugins/evidence --editable "$requirement")

export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-180}"
# Python compiles a module when it imports it first, unless it must not write the result.
[ -z "${PYTHONDONTWRITEBYTECODE:-}" ] || export UV_COMPILE_BYTECODE=1

install_by_uv() {
    ! "$python" -m pip config list | grep -q index &&
        "$python" -m pip install --quiet 'uv>=0.13,<0.14' &&
        "$python" -m uv pip install --quiet --python "$python" "${what[@]}"
}

if ! install_by_uv; then
    echo "pip installs $requirement, because uv cannot; this takes minutes" >&2
    "$python" -m pip install --quiet "${what[@]}"
fi
