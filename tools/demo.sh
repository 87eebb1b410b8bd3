#!/usr/bin/env bash
# The demo, on a machine without a GPU:   bash tools/demo.sh [--seed N] [section.key=value ...]
#
# Sets up .venv, makes the tiny model and its prompts, trains it with ReVal, draws the learning curve. The overrides go to
# `reval train`. Seed N has a model and a run of its own, runs/demo_model_seedN and runs/demo_seedN.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    sed -n '2,5s/^# \{0,1\}//p' tools/demo.sh
    exit "$1"
}

seed=0 suffix=
while (($#)); do
    case $1 in
        --seed)
            [[ ${2:-} =~ ^[0-9]+$ ]] || { echo "tools/demo.sh: --seed ${2:-}: give a whole number >= 0" >&2; exit 2; }
            seed=$2 suffix=_seed$2
            shift 2
            ;;
        --seed=*) set -- --seed "${1#*=}" "${@:2}" ;;
        -h | --help) usage 0 ;;
        *) break ;;
    esac
done

model=runs/demo_model$suffix run=runs/demo$suffix
for override in "$@"; do
    case $override in
        run.directory=*) run=${override#*=} run=${run%/} ;;
        *=*) ;;
        *) usage 2 >&2 ;;
    esac
done

# OpenMP's threads spin while they wait, which on a busy machine makes two of them slower than one, up to 20 times.
export OMP_WAIT_POLICY=passive
bash tools/environment.sh base
start=$SECONDS
.venv/bin/python -m tools.make_tiny_model --out "$model" --seed "$seed"

# `reval train` goes on with a run that it finds; a demo is a run from the start. The last one is kept.
if [[ -e $run ]]; then
    rm -rf "$run.previous"
    mv "$run" "$run.previous"
    echo "demo: the earlier run is now $run.previous"
fi
.venv/bin/reval train configs/demo.toml "run.seed=$seed" "model.hf_path=$model" "prompts.train=$model/prompts/train.jsonl" \
    "prompts.held_out=$model/prompts/held_out.jsonl" "run.directory=$run" "$@"
if [[ ! -e $run/summary.json ]]; then
    echo "demo: stopped before the end, nothing to report yet" >&2
    exit 130
fi
curve=$(.venv/bin/reval report "$run")

cat <<END
demo: done in $((SECONDS - start)) s, after installation
  figures           $run/summary.json
  learning curve    $curve
  every step        $run/metrics.jsonl
  TensorBoard       .venv/bin/python -m tensorboard.main --logdir $run/tensorboard
END
