#!/usr/bin/env bash
# Waits for the preemption notice that AWS gives a spot machine two minutes in advance, and sends
# SIGTERM to the training workers of this node, which write a checkpoint and end
# (docs/reliability.md). Ray's own processes get no signal: a raylet would kill its workers at once.
# ray_cluster.yaml starts it; a second instance on the same node ends at once.
#
#   SKILLNET_METADATA   metadata service, if it is not that of AWS (for tests)
set -euo pipefail

metadata="${SKILLNET_METADATA:-http://169.254.169.254}/latest"

mkdir -p "$HOME/.skillnet"
exec 9>"$HOME/.skillnet/watch_spot.lock"
flock --nonblock 9 || exit 0

ask() {
    curl --silent --fail --max-time 2 --noproxy '*' "$@"
}

# Action and time of the preemption. The service answers 404 before the notice.
notice() {
    local session
    session="$(ask -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$metadata/api/token")" &&
        ask -H "X-aws-ec2-metadata-token: $session" "$metadata/meta-data/spot/instance-action"
}

until action="$(notice)"; do sleep 5; done
echo "$(date --utc +%FT%TZ) this machine will be preempted: $action"

# Signal each worker once, also workers that start later: a second signal ends a worker at once.
declare -A signalled=()
while true; do
    for pid in $(pgrep -u "$(id -u)" -f "^ray::RayTrainWorker" || true); do
        if [ -z "${signalled[$pid]:-}" ] && kill -TERM "$pid"; then
            signalled[$pid]=1
            echo "$(date --utc +%FT%TZ) sent SIGTERM to worker $pid"
        fi
    done
    sleep 1
done
