#!/usr/bin/env bash
# Installs what slurm/mini/mini_slurm.py needs, from Debian's packages:   bash slurm/mini/install.sh
#
# As root; 4 MB to download. Nothing is started, and a Slurm that is there already stays as it is.
set -euo pipefail

if command -v slurmctld slurmd munged srun >/dev/null; then
    exit 0
fi
[[ $(id -u) == 0 ]] || { echo "slurm/mini/install.sh: needs root; or install slurmctld, slurmd and munge yourself" >&2; exit 1; }
command -v apt-get >/dev/null || { echo "slurm/mini/install.sh: knows Debian and its kin only; install slurm and munge" >&2; exit 1; }
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# its packages would start daemons of the machine's own, which nobody asked for
policy=/usr/sbin/policy-rc.d
[[ -e $policy ]] || { printf '#!/bin/sh\nexit 101\n' >"$policy"; chmod 755 "$policy"; trap 'rm -f "$policy"' EXIT; }
apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null
