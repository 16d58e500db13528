#!/usr/bin/env bash
# One skillnet command on the nodes of a SLURM job, which form a Ray cluster as long as it runs.
#
#   ray get-auth-token --generate            # once
#   export SKILLNET_HOME=/shared/skillnet    # runs and corpora: a path that all nodes share
#   sbatch --nodes 2 platform/deploy/slurm.sh finetune --config base --name my-run \
#       --training.workers 16
#
# Submit it from the checkout, which lies on a shared disk, in the environment that has the package.
# Three minutes before its end a job writes a checkpoint and queues again; the next start resumes
# the run of this name. Change the lines below, or give them as options of sbatch.
#SBATCH --job-name=skillnet
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

fail() {
    echo "slurm.sh: $*" >&2
    exit 2
}

[ $# -gt 0 ] || fail "give a command of skillnet: sbatch platform/deploy/slurm.sh finetune ..."
[ -n "${SLURM_JOB_ID:-}" ] || fail "SLURM_JOB_ID is not set: start this script with sbatch"
[ -n "${SKILLNET_HOME:-}" ] || fail "SKILLNET_HOME is not set: give a path that all nodes share"
command -v skillnet >/dev/null || fail "skillnet is not on PATH: activate its environment first"
# sbatch runs a copy of this script; the job starts where it was submitted.
deploy="$PWD/platform/deploy"
[ -f "$deploy/setup_node.sh" ] || fail "$deploy is missing: submit from the root of the checkout"
[ -n "${RAY_AUTH_TOKEN:-}" ] || [ -s "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}" ] ||
    fail "no token; generate one with: ray get-auth-token --generate"

# This shell runs on the first node, which becomes the head. Its name often resolves to 127.0.1.1.
settings="$(bash "$deploy/setup_node.sh" settings)"
eval "$settings"
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_HEAD_IP="$SKILLNET_NODE_IP"
# Nodes that mount the environment from a network need more than Ray's 30 seconds.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT="${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-300}"
# Nodes end soon after the head.
export RAY_gcs_rpc_server_reconnect_timeout_s=10
state="$(mktemp -d)"
address="$RAY_HEAD_IP:$((20000 + SLURM_JOB_ID % 10000))"

# shellcheck disable=SC2016 # the shells of the nodes expand it
node='settings="$(bash "$0/setup_node.sh" settings)" && eval "$settings" && exec ray symmetric-run "$@"'
# A notice goes to this process alone: a signal to Ray's processes would end the run at once.
# shellcheck disable=SC2016
driver='RAY_ADDRESS="$1" skillnet "${@:2}" & echo $! >"$0/pid"; wait $!; echo $? >"$0/status"'

# --wait ends the other nodes half a minute after the head.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --wait=30 \
    bash -c "$node" "$deploy" --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
    -- bash -c "$driver" "$state" "$address" "$@" &
step=$!
trap 'kill -TERM "$(cat "$state/pid" 2>/dev/null || echo "$step")"' TERM
# `wait` returns at each signal, too.
while kill -0 "$step" 2>/dev/null; do
    wait "$step" || true
done

status="$(cat "$state/status" 2>/dev/null || echo 1)"
rm -rf "$state"
# The exit code of a run that wrote a checkpoint after a notice.
if [ "$status" = 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
