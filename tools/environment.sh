#!/usr/bin/env bash
# Makes .venv in this clone:   bash tools/environment.sh [base|dev]
#
# Third-party packages are installed once, into layers outside the clone, and .venv points at them; so another clone costs
# seconds, and a second run nothing. A layer's key covers all that decides its content, a layer is used only once it has its
# marker, and a half-made one is thrown away. The dev layer lies on top of the base layer and never changes it, so
# a run in progress keeps the files it started with.
#
# PYTHON names the interpreter (default: the first Python >= 3.11 on PATH, 3.11 preferred: constraints.txt is for it).
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

fail() {
    printf 'tools/environment.sh: %s\n' "$*" >&2
    exit 1
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        is_new_enough "$PYTHON" || fail "PYTHON = $PYTHON is not a Python >= 3.11; name one that is"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3.11 python3 python3.12 python3.13; do
        if is_new_enough "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python >= 3.11 on PATH (python3 is $(python3 --version 2>&1 || true)); install one, or set PYTHON to its path"
}

# Prints the layer key, then the stamp of an editable install from this clone.
describe() {
    "$python" - "$repo" <<'PYTHON'
import hashlib, json, pathlib, platform, sys, tomllib

repo = pathlib.Path(sys.argv[1])
text = (repo / "pyproject.toml").read_bytes()
metadata = tomllib.loads(text.decode())
project = metadata["project"]
lists = [metadata["build-system"]["requires"], project["dependencies"], project["optional-dependencies"]["dev"]]
parts = [
    (repo / "constraints.txt").read_text(),
    "layers 1",  # raise when make_layer changes what it makes
    json.dumps(lists),
    sys.implementation.cache_tag,
    platform.python_version(),
    sys.base_prefix,
    sys.platform,
    platform.machine(),
]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16])
print(hashlib.sha256(text + str(repo).encode()).hexdigest()[:16])
PYTHON
}

# Prints the requirements of a layer, one a line.
requirements() {
    "$python" - "$repo" "$1" <<'PYTHON'
import pathlib, sys, tomllib

metadata = tomllib.loads((pathlib.Path(sys.argv[1]) / "pyproject.toml").read_text())
project = metadata["project"]
# the editable install builds without isolation, so what builds it belongs to the base
base = [*metadata["build-system"]["requires"], "editables", *project["dependencies"]]
print("\n".join(base if sys.argv[2] == "base" else project["optional-dependencies"]["dev"]))
PYTHON
}

site_packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

# make_layer NAME: nothing where its marker is there, else from nothing. The caller holds the lock.
make_layer() {
    local name=$1 layer=$layers/$1 start=$SECONDS list
    [[ -e $layer/.complete ]] && return
    echo "environment: installing the $name packages into $layer (once; minutes)"
    rm -rf "$layer"
    list=$(mktemp)
    requirements "$name" >"$list"
    if [[ $name == base ]]; then
        "$python" -m venv "$layer" || fail "python -m venv failed; on Debian: apt install python3-venv"
        # First and alone: the pin decides between builds with and without CUDA before anything else asks for torch.
        "$layer/bin/python" -m pip install --quiet -c constraints.txt torch
    else
        "$python" -m venv --without-pip "$layer"
        site_packages "$layers/base" >"$(site_packages "$layer")/layers.pth"
    fi
    "$layer/bin/python" -m pip install --quiet -c constraints.txt -r "$list"
    rm -f "$list"
    touch "$layer/.complete"
    echo "environment: $name packages installed in $((SECONDS - start)) s"
}

# link_venv LAYER...: .venv with the clone installed in it and the layers behind it.
link_venv() {
    local layer start=$SECONDS
    if [[ $(head -n 1 .venv/.stamp 2>/dev/null) != "$stamp" ]]; then
        rm -rf .venv
        "$python" -m venv --without-pip .venv
    fi
    for layer in "$@"; do site_packages "$layers/$layer"; done >"$(site_packages .venv)/layers.pth"
    .venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
    printf '%s\n' "$stamp" "$@" >.venv/.stamp
    echo "environment: .venv ready (layers: $*) in $((SECONDS - start)) s"
}

# Whether .venv is of this stamp and has the wanted layers behind it, all of them whole. One with more serves too.
is_ready() {
    local layer
    [[ -x .venv/bin/reval && $(head -n 1 .venv/.stamp 2>/dev/null) == "$stamp" ]] || return 1
    for layer in "${names[@]}"; do
        [[ -e $layers/$layer/.complete ]] && grep -qx "$layer" .venv/.stamp || return 1
    done
}

main() {
    local wanted=${1:-base} described layer
    local -a names
    case $wanted in
        base) names=(base) ;;
        dev) names=(base dev) ;;
        *) fail "unknown set of packages '$wanted'; give base or dev" ;;
    esac
    cd "$repo"
    python=$(find_python)
    described=$(describe)
    layers=${XDG_CACHE_HOME:-$HOME/.cache}/reval_mcore/deps-${described%%$'\n'*}
    stamp=${described//$'\n'/-}
    mkdir -p "$layers"
    exec {lock}>"$layers/.lock"
    flock --nonblock "$lock" || { echo "environment: waiting for another set-up in $layers"; flock "$lock"; }
    if ! is_ready; then
        for layer in "${names[@]}"; do make_layer "$layer"; done
        link_venv "${names[@]}"
    fi
    exec {lock}>&-
}

main "$@"
