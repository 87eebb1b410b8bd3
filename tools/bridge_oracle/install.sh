#!/usr/bin/env bash
# Makes an environment in which megatron-bridge reads HF directories:   bash tools/bridge_oracle/install.sh
#
# 150 MB on top of the base packages of tools/environment.sh, which lie behind it (torch, megatron-core); made once, outside
# the clone, under a key of all that decides its content. .bridge_oracle in the clone points at it, so another clone costs a
# second. It is used only once it has its marker, and a half-made one is thrown away. For tests/oracle only.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
repo=$(cd "$here/../.." && pwd -P)

fail() {
    printf 'tools/bridge_oracle/install.sh: %s\n' "$*" >&2
    exit 1
}

site_packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

# make_environment DIR BASE_PACKAGES: from nothing. The caller holds the lock.
make_environment() {
    local made=$1 base_packages=$2 base=${2%/lib/*} start=$SECONDS
    echo "bridge_oracle: installing megatron-bridge into $made (once; 150 MB)"
    rm -rf "$made"
    "$base/bin/python" -m venv --without-pip "$made" || fail "python -m venv failed; on Debian: apt install python3-venv"
    "$base/bin/python" -m pip --python "$made/bin/python" install --quiet --no-deps -r "$here/requirements.txt" ||
        fail "pip could not install $here/requirements.txt (no network, or no room in $made?); mend that and run this again"
    # only now: pip must not take what lies there for installed
    echo "$base_packages" >"$(site_packages "$made")/layers.pth"
    # given no HF directory it imports, and no more
    "$made/bin/python" -W ignore "$here/export.py" "$made" ||
        fail "megatron-bridge does not import in $made; the last lines above say why"
    touch "$made/.complete"
    echo "bridge_oracle: installed in $((SECONDS - start)) s"
}

main() {
    local cache made base_packages key
    bash "$repo/tools/environment.sh" base
    base_packages=$(head -n 1 "$(site_packages "$repo/.venv")/layers.pth")
    # the path of the base packages holds the key of all that decides theirs; raise the number when make_environment changes
    key=$({ cat "$here/requirements.txt"; echo "$base_packages 1"; } | sha256sum | cut -c 1-16)
    cache=${XDG_CACHE_HOME:-$HOME/.cache}/reval_mcore
    made=$cache/bridge-$key
    mkdir -p "$cache"
    exec {lock}>"$made.lock"
    flock --nonblock "$lock" || { echo "bridge_oracle: waiting for another set-up in $made"; flock "$lock"; }
    [[ -e $made/.complete ]] || make_environment "$made" "$base_packages"
    exec {lock}>&-
    ln -sfn "$made" "$repo/.bridge_oracle"
}

main "$@"
