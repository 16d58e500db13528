#!/usr/bin/env bash
# Sets up one machine as a node of a cluster. ray_cluster.yaml, on_prem.yaml, kuberay.yaml and the
# tests call it.
#
#   setup_node.sh install    installs the dependencies, and writes ~/.skillnet/env.sh, which every shell reads
#   setup_node.sh settings   prints settings for a shell before `ray start`: address and interface of
#                            this node, Ray's directory, and the limit of open files
#
# Only dependencies are installed. Each job brings our own code, and an installed copy would mix with
# it. Files lie beside this script; settings come from the environment:
#   SKILLNET_HOME        directory of runs (required): a path that all nodes share, or, for runs in
#                        an object store, a path on each node's own disk
#   SKILLNET_NFS         SERVER:/PATH of a network file system to mount there, if it is not mounted
#   MLFLOW_TRACKING_URI  URI of the MLflow server, if there is one
#   SKILLNET_VENV        virtual environment (~/.skillnet/venv); an existing one is used
#   SKILLNET_PYTHON      interpreter that creates it
#   SKILLNET_INTERFACE   network interface, if the route does not name it
#   RAY_TMPDIR           directory of Ray's sessions (/tmp/skillnet-UID)
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
state="$HOME/.skillnet"
token="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
requirements="$here/requirements.txt"

fail() {
    echo "setup_node.sh: $*" >&2
    exit 1
}

# Ray gives its sessions mode 0777. A user who can replace a socket in them can run code as this user,
# so the sessions lie in a directory that nobody else can enter. A RAY_TMPDIR of the user is kept.
private_directory="/tmp/skillnet-$(id -u)"
ray_directory="${RAY_TMPDIR:-$private_directory}"

make_ray_directory() {
    [ "$ray_directory" = "$private_directory" ] || return 0
    # /tmp is emptied when the machine starts, and others may create the name before this user does.
    mkdir -m 700 "$ray_directory" 2>/dev/null || true
    [ ! -L "$ray_directory" ] && [ -d "$ray_directory" ] && [ -O "$ray_directory" ] &&
        [ -z "$(find "$ray_directory" -maxdepth 0 -perm /077)" ] ||
        fail "$ray_directory is not a directory of mode 0700 of this user; remove it, or set" \
            "RAY_TMPDIR to a directory that only this user can enter"
}

# Versions were pinned under one Python: "# python 3.12" in the first line of the requirements.
pinned_python() {
    sed -n '1s/^# python \([0-9.]*\).*/\1/p' "$requirements"
}

find_python() {
    local wanted
    for wanted in "${SKILLNET_PYTHON:-}" "python$(pinned_python)" python3.12 python3.13 python3.14 python3.11; do
        if [ -n "$wanted" ] && command -v "$wanted" >/dev/null; then
            command -v "$wanted"
            return
        fi
    done
    fail "no Python 3.11 to 3.14 here; install python3.12 and python3.12-venv, or name one with" \
        "SKILLNET_PYTHON"
}

# The Python of Debian and Ubuntu has no venv. A new cloud image may still install its updates, so
# wait for the lock.
make_venv() {
    local python package root=()
    python="$(find_python)"
    if ! "$python" -c 'import ensurepip' 2>/dev/null; then
        package="$(basename "$python")-venv"
        command -v apt-get >/dev/null || fail "install $package on $(hostname)"
        [ "$(id -u)" = 0 ] || root=(sudo)
        "${root[@]}" apt-get -o DPkg::Lock::Timeout=300 update -qq
        "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 \
            install -y -qq --no-install-recommends "$package"
    fi
    "$python" -m venv "$venv"
}

install_dependencies() {
    [ -f "$requirements" ] ||
        fail "$requirements is missing; write it with: skillnet pin-nodes"
    venv="${SKILLNET_VENV:-$state/venv}"
    [ -x "$venv/bin/python" ] || make_venv
    # pip downloads nothing if all versions are installed: a second `ray up` takes seconds.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --root-user-action ignore \
        --requirement "$requirements"
}

mount_storage() {
    [ -n "${SKILLNET_NFS:-}" ] || return 0
    local root=()
    [ "$(id -u)" = 0 ] || root=(sudo)
    if ! command -v mount.nfs4 >/dev/null; then
        "${root[@]}" apt-get -o DPkg::Lock::Timeout=300 update -qq
        "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 \
            install -y -qq --no-install-recommends nfs-common
    fi
    "${root[@]}" mkdir -p "$SKILLNET_HOME"
    if ! mountpoint -q "$SKILLNET_HOME"; then
        # hard: an unreachable server pauses a run and loses no writes
        "${root[@]}" mount -t nfs4 -o nfsvers=4.1,hard,timeo=600,retrans=2,noresvport \
            "$SKILLNET_NFS" "$SKILLNET_HOME" || fail "$SKILLNET_NFS cannot be mounted"
        "${root[@]}" chown "$(id -u):$(id -g)" "$SKILLNET_HOME"
    fi
}

write_environment() {
    mkdir -p "$state"
    cat >"$state/env.sh" <<END
# Written by setup_node.sh. Ray runs the first python on PATH; its mode of authentication must be
# the same in every process of the cluster.
case ":\$PATH:" in *":$venv/bin:"*) ;; *) export PATH="$venv/bin:\$PATH" ;; esac
export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0
export RAY_TMPDIR="$ray_directory"
export SKILLNET_HOME="$SKILLNET_HOME"
END
    if [ -n "${RAY_AUTH_TOKEN_PATH:-}" ]; then
        echo "export RAY_AUTH_TOKEN_PATH=\"$RAY_AUTH_TOKEN_PATH\"" >>"$state/env.sh"
    fi
    if [ -n "${MLFLOW_TRACKING_URI:-}" ]; then
        echo "export MLFLOW_TRACKING_URI=\"$MLFLOW_TRACKING_URI\"" >>"$state/env.sh"
    fi
    if [ -n "${SKILLNET_INTERFACE:-}" ]; then
        echo "export SKILLNET_INTERFACE=\"$SKILLNET_INTERFACE\"" >>"$state/env.sh"
    fi
    # The first line, because many .bashrc files return early in non-interactive shells.
    touch "$HOME/.bashrc"
    # shellcheck disable=SC2016 # the reading shell expands it
    grep -qF '.skillnet/env.sh' "$HOME/.bashrc" ||
        sed -i '1{h;s/.*/. "$HOME\/.skillnet\/env.sh"/;G}' "$HOME/.bashrc"
    # shellcheck disable=SC2016
    grep -qF '.skillnet/env.sh' "$HOME/.bashrc" ||
        echo '. "$HOME/.skillnet/env.sh"' >>"$HOME/.bashrc" # sed has no first line in an empty file
}

install() {
    [ -n "${SKILLNET_HOME:-}" ] ||
        fail "SKILLNET_HOME is not set: give the directory of runs on the nodes"
    case "$SKILLNET_HOME" in
    *://*) fail "SKILLNET_HOME is a path on the nodes; use --data and --run_dir for an object store" ;;
    esac
    make_ray_directory
    install_dependencies
    mount_storage
    write_environment
    if [ -z "${RAY_AUTH_TOKEN:-}" ]; then
        [ -s "$token" ] || fail "no token in $token; generate one with: ray get-auth-token --generate"
        chmod 600 "$token"
    fi
}

# A host name often resolves to 127.0.1.1, and gloo would announce that to other nodes, so name the
# interface. A worker takes the interface to the head (RAY_HEAD_IP, set by `ray up`). The head takes
# the interface of the ssh connection of `ray up`, else that of the default route.
settings() {
    command -v ip >/dev/null || fail "install iproute2 on $(hostname)"
    local interface="${SKILLNET_INTERFACE:-}" address="" route came_in
    if [ -n "$interface" ]; then
        address="$(ip -o -4 addr show dev "$interface" 2>/dev/null | awk '{split($4, a, "/"); print a[1]; exit}')" ||
            true
        [ -n "$address" ] || fail "SKILLNET_INTERFACE=$interface has no IPv4 address"
    elif [ -n "${RAY_HEAD_IP:-}" ]; then
        route="$(ip -o route get "$RAY_HEAD_IP")" || fail "no route to the head, $RAY_HEAD_IP"
        interface="$(sed -n 's/.* dev \([^ ]*\).*/\1/p' <<<"$route")"
        address="$(sed -n 's/.* src \([^ ]*\).*/\1/p' <<<"$route")"
    else
        came_in="$(awk '{print $3}' <<<"${SSH_CONNECTION:-}")"
        if [ -z "$came_in" ]; then
            route="$(ip -o route get 192.0.2.1 2>/dev/null)" ||
                fail "no default route; name the interface with SKILLNET_INTERFACE"
            came_in="$(sed -n 's/.* src \([^ ]*\).*/\1/p' <<<"$route")"
        fi
        address="$came_in"
        interface="$(ip -o -4 addr show | awk -v a="$address" \
            '{split($4, b, "/"); if (b[1] == a) {print $2; exit}}')"
    fi
    [ -n "$interface" ] || fail "no interface has the address $address; set SKILLNET_INTERFACE"
    make_ray_directory
    echo "export SKILLNET_NODE_IP=$address"
    echo "export RAY_TMPDIR=$ray_directory"
    echo "export GLOO_SOCKET_IFNAME=$interface NCCL_SOCKET_IFNAME=$interface"
    # Ray opens many files and sockets: raise the soft limit up to the hard limit.
    local files
    files="$(ulimit -H -n)"
    if [ "$files" = unlimited ] || [ "$files" -gt 65536 ]; then files=65536; fi
    echo "ulimit -S -n $files"
}

case "${1:-}" in
install | settings) "$1" ;;
*) fail "unknown argument; use install or settings" ;;
esac
