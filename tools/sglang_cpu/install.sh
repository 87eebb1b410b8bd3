#!/usr/bin/env bash
# Makes an environment in which the real SGLang serves on a CPU:   bash tools/sglang_cpu/install.sh
#
# 2.6 GB, made once, outside the clone, under a key of all that decides its content; .sglang_cpu in the clone points at it,
# so another clone costs a second. It is used only once it has its marker, and a half-made one is thrown away.
# For tests and for a first try without a GPU. A machine with GPUs serves with its own SGLang.
#
# PYTHON names the interpreter (default python3.11: requirements.txt is for it).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
repo=$(cd "$here/../.." && pwd -P)

fail() {
    printf 'tools/sglang_cpu/install.sh: %s\n' "$*" >&2
    exit 1
}

# Prints the key of the environment.
describe() {
    "$python" - "$here" <<'PYTHON'
import hashlib, pathlib, platform, sys

here = pathlib.Path(sys.argv[1])
files = [here / "requirements.txt", *sorted((here / "shim").glob("*.py"))]
parts = [
    *(path.read_text() for path in files),
    "1",  # raise when make_environment changes what it makes
    platform.python_version(),
    sys.base_prefix,
    sys.platform,
    platform.machine(),
]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16])
PYTHON
}

# make_environment DIR: from nothing. The caller holds the lock.
make_environment() {
    local made=$1 start=$SECONDS packages
    echo "sglang_cpu: installing SGLang for CPU into $made (once; 2.6 GB, minutes)"
    rm -rf "$made"
    "$python" -m venv "$made" || fail "python -m venv failed; on Debian: apt install python3-venv"
    "$made/bin/python" -m pip install --quiet --no-deps -r "$here/requirements.txt"
    [[ $("$made/bin/python" -c 'import torch; print(torch.version.cuda)') == None ]] ||
        fail "pip gave a CUDA build of torch; point it at an index with CPU builds (PIP_INDEX_URL) and run this again"
    packages=$("$made/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    cp "$here"/shim/*.py "$packages/"
    echo "import sglang_cpu_shim" >"$packages/sglang_cpu_shim.pth"
    SGLANG_USE_CPU_ENGINE=1 "$made/bin/python" -c 'import sglang.srt.entrypoints.http_server' ||
        fail "SGLang does not import in $made; the last lines above say why"
    touch "$made/.complete"
    echo "sglang_cpu: installed in $((SECONDS - start)) s"
}

main() {
    local cache made
    python=$(command -v "${PYTHON:-python3.11}") || fail "no ${PYTHON:-python3.11} on PATH; install Python 3.11 or set PYTHON to its path"
    cache=${XDG_CACHE_HOME:-$HOME/.cache}/reval_mcore
    made=$cache/sglang-$(describe)
    mkdir -p "$cache"
    exec {lock}>"$made.lock"
    flock --nonblock "$lock" || { echo "sglang_cpu: waiting for another set-up in $made"; flock "$lock"; }
    [[ -e $made/.complete ]] || make_environment "$made"
    exec {lock}>&-
    ln -sfn "$made" "$repo/.sglang_cpu"
}

main "$@"
