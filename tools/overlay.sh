#!/usr/bin/env bash
# Makes an environment on top of the base packages of tools/environment.sh, for tests of what must not be among them:
#
#     bash tools/overlay.sh NAME REQUIREMENTS ARGUMENTS...       and .NAME in the clone is it
#
# REQUIREMENTS are installed as they stand, without what they ask for; then Python is run with ARGUMENTS, to show that they
# import. Made once, outside the clone, under a key of all that decides its content, so another clone costs a second. It is
# used only once it has its marker, and a half-made one is thrown away.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
name=$1
requirements=$2
shift 2

fail() {
    printf '%s: %s\n' "$name" "$*" >&2
    exit 1
}

site_packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

# make_environment DIR BASE_PACKAGES ARGUMENTS...: from nothing. The caller holds the lock.
make_environment() {
    local made=$1 base_packages=$2 base=${2%/lib/*} start=$SECONDS
    shift 2
    echo "$name: installing $requirements into $made (once)"
    rm -rf "$made"
    "$base/bin/python" -m venv --without-pip "$made" || fail "python -m venv failed; on Debian: apt install python3-venv"
    "$base/bin/python" -m pip --python "$made/bin/python" install --quiet --no-deps -r "$requirements" ||
        fail "pip could not install $requirements (no network, or no room in $made?); mend that and run this again"
    # only now: pip must not take what lies there for installed
    echo "$base_packages" >"$(site_packages "$made")/layers.pth"
    "$made/bin/python" -W ignore "$@" || fail "it does not import in $made; the last lines above say why"
    touch "$made/.complete"
    echo "$name: installed in $((SECONDS - start)) s"
}

main() {
    local cache made base_packages key
    bash "$repo/tools/environment.sh" base
    base_packages=$(head -n 1 "$(site_packages "$repo/.venv")/layers.pth")
    # the path of the base packages holds the key of all that decides theirs; raise the number when make_environment changes
    key=$({ cat "$requirements"; echo "$base_packages 2"; } | sha256sum | cut -c 1-16)
    cache=${XDG_CACHE_HOME:-$HOME/.cache}/reval_mcore
    made=$cache/$name-$key
    mkdir -p "$cache"
    exec {lock}>"$made.lock"
    flock --nonblock "$lock" || { echo "$name: waiting for another set-up in $made"; flock "$lock"; }
    [[ -e $made/.complete ]] || make_environment "$made" "$base_packages" "$@"
    exec {lock}>&-
    ln -sfn "$made" "$repo/.$name"
}

main "$@"
