#!/bin/sh
# Add two skills to the model of `make demo`, use them, and remove them without a trace.
#   sh examples/skills.sh          `make skills` runs this
#   sh examples/skills.sh grow     trains the skills, as `make demo` does at its end
set -eu
runs=${SKILLNET_HOME:-runs}
examples=$(dirname "$0")
shelf=$runs/skills
model=$shelf/model

fail() { echo "error: $1" >&2; exit 1; }
run() { printf '\n$ skillnet %s\n' "$*"; skillnet "$@"; }
show_digest() { echo "SHA-256 of all files $1 $(cd "$model" && sha256sum ./* | sha256sum | cut -c1-32)"; }

base=$(ls -d "$runs"/quickstart-* 2>/dev/null | tail -n 1)
[ -n "$base" ] || fail "$runs: no model of the demo. Run: make demo"

# A skill and a head train for 60 steps each; every file of the base stays as it is.
grow() {
    name=$(basename "$base" | sed "s/quickstart/$1/")
    { [ -d "$runs/$name/model" ] || skillnet grow "$base" --config "grow/$2" --name "$name" \
        --training.steps 60 --references '[]' --tracking.register false; } &&
        skillnet pack "$name" --output "$shelf/$2.skill"
}
if [ "${1:-}" = grow ] || [ ! -f "$shelf/base-of-$(basename "$base")" ]; then
    mkdir -p "$shelf"
    echo "growing two small skills, stroke-count and radical ($shelf/grow.log)"
    { skillnet prepare radicals --config prepare/stroke-counts && grow counting stroke-count && grow radicals radical
    } >"$shelf/grow.log" 2>&1 || fail "$(tail -n 1 "$shelf/grow.log")"
    touch "$shelf/base-of-$(basename "$base")"
    [ "${1:-}" != grow ] || exit 0
fi

rm -rf "$model"
run export --model "$base" --to hf --output "$model"
before=$(show_digest "before:")
run add "$shelf/stroke-count.skill" "$shelf/radical.skill" --to "$model"
run predict "$examples/forest.mp4" --model "$model" --task radical --top 1
run predict "$examples/forest.mp4" --model "$model" --task stroke_count --top 2
# Its table is that of `add` without the new tasks.
run remove stroke-count radical --from "$model" | sed -n 1,2p
echo "$before"
show_digest "after: "
