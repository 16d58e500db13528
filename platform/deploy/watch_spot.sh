#!/usr/bin/env bash
# Watches for the notice that a spot machine of AWS gets two minutes before it is taken away, and
# passes it on as SIGTERM to the training workers of this node, which write a checkpoint and leave
# (docs/reliability.md). Not to Ray's own processes: a raylet that gets it takes its workers down at
# once. Started by ray_cluster.yaml; a second one on the same node ends at once.
#
#   SKILLNET_METADATA   the metadata service, if it is not AWS' own (the tests play one)
set -euo pipefail

metadata="${SKILLNET_METADATA:-http://169.254.169.254}/latest"

mkdir -p "$HOME/.skillnet"
exec 9>"$HOME/.skillnet/watch_spot.lock"
flock --nonblock 9 || exit 0

ask() {
    curl --silent --fail --max-time 2 --noproxy '*' "$@"
}

# What is to happen and when; until that is decided the service answers 404.
notice() {
    local session
    session="$(ask -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$metadata/api/token")" &&
        ask -H "X-aws-ec2-metadata-token: $session" "$metadata/meta-data/spot/instance-action"
}

until told="$(notice)"; do sleep 5; done
echo "$(date --utc +%FT%TZ) this machine is about to be taken away: $told"

# Each worker once, since a second signal ends it at once; and those that start meanwhile.
declare -A asked=()
while true; do
    for pid in $(pgrep -u "$(id -u)" -f "^ray::RayTrainWorker" || true); do
        if [ -z "${asked[$pid]:-}" ] && kill -TERM "$pid"; then
            asked[$pid]=1
            echo "$(date --utc +%FT%TZ) asked worker $pid to leave"
        fi
    done
    sleep 1
done
