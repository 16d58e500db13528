#!/usr/bin/env bash
# Install the project and its dependencies: install.sh PYTHON REQUIREMENT
#
# TORCH is the build of torch: auto, the default, is the CPU build where no NVIDIA driver is; cuda is
# the build of the package index; other names are backends of uv, such as cpu, cu130 or rocm7.2.
#
# uv needs half the time of pip for the several gigabytes of torch. It does not read pip's settings,
# so pip installs where an own index is set, and where uv fails.
set -euo pipefail
python=$1 requirement=$2 torch=${TORCH:-auto}
# The statistics are a distribution of their own, which no index has.
what=(--editable plugins/evidence --editable "$requirement")

export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-180}"
# Python compiles a module when it imports it first, unless it must not write the result.
[ -z "${PYTHONDONTWRITEBYTECODE:-}" ] || export UV_COMPILE_BYTECODE=1

run_uv() {
    "$python" -m uv pip install --quiet --python "$python" "$@"
}

# The builds are on an index of their own, which may be out of reach. The question for one package
# ends in seconds.
finds_torch() {
    local bounds
    bounds=$(sed -n 's/^ *"\(torch[<>=][^"]*\)".*/\1/p' pyproject.toml)
    UV_HTTP_TIMEOUT=10 UV_HTTP_RETRIES=1 \
        run_uv --torch-backend "$torch" --dry-run --reinstall --no-deps "$bounds" 2>/dev/null
}

install_by_uv() {
    ! "$python" -m pip config list | grep -q index || return
    "$python" -m pip install --quiet 'uv>=0.13,<0.14' || return
    if [ "$torch" != cuda ]; then
        finds_torch && run_uv --torch-backend "$torch" "${what[@]}" && return
        echo "TORCH=$torch: uv cannot install this build of torch from its own index, so that of the" \
            "package index follows, with about 2.5 GB of CUDA libraries; TORCH=cuda asks for it" >&2
    fi
    run_uv "${what[@]}"
}

if ! install_by_uv; then
    echo "pip installs $requirement, because uv cannot; this takes minutes" >&2
    "$python" -m pip install --quiet "${what[@]}"
fi
