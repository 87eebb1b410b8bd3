#!/usr/bin/env bash
# Every check that this machine can run:   bash tools/test.sh [pytest arguments]
#
# Sets up .venv with the dev extras and, once, SGLang for CPU (2.6 GB), megatron-bridge (150 MB), nemo-run (100 MB) and, only
# for CI, Slurm (from Debian's packages); then lint, format, import contracts, types, tests. Stops at the first that fails.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stage() {
    local name=$1 start=$SECONDS
    shift
    "$@" || return  # also where the caller goes on after a failure, which turns errexit off in here
    echo "test: $name passed in $((SECONDS - start)) s"
}

# OpenMP's threads spin while they wait, which on a busy machine makes two of them slower than one, up to 20 times.
export OMP_WAIT_POLICY=passive
python=.venv/bin/python
stage "environment" bash tools/environment.sh dev
# where it cannot be made (no room, no network), the tests on real servers are skipped and say so; CI requires them
stage "SGLang for CPU" bash tools/sglang_cpu/install.sh || [[ ${CI:-} != true ]]
# likewise, and the tests against megatron-bridge, and those of nemo-run
stage "megatron-bridge" bash tools/bridge_oracle/install.sh || [[ ${CI:-} != true ]]
stage "nemo-run" bash tools/nemo_run/install.sh || [[ ${CI:-} != true ]]
# a package of the whole system: nobody's machine gets it unasked
[[ ${CI:-} != true ]] || stage "Slurm" bash slurm/mini/install.sh
stage "ruff check" "$python" -m ruff check
stage "ruff format" "$python" -m ruff format --check
# the module has no entry point of its own, and .venv has no console scripts but reval
stage "import contracts" "$python" -c 'import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())'
stage "pyright" "$python" -m pyright
echo "test: pytest"
if (($#)); then
    exec "$python" -m pytest "$@"
fi
# side by side where a test is one process, the longest first; the others have several themselves
status=0
"$python" -m pytest tests/integration tests/unit -n 2 --dist loadfile --no-loadscope-reorder || status=$?
"$python" -m pytest tests/distributed tests/gpu tests/oracle tests/sglang tests/slurm || status=$?
exit "$status"
