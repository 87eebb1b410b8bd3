#!/usr/bin/env bash
# Makes an environment with nemo-run, for the tests of launchers.nemo; 100 MB, once:
#
#     bash tools/nemo_run/install.sh
#
# Users take the extra of this package instead: pip install "reval_mcore[launch]".
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
exec bash "$here/../overlay.sh" nemo_run "$here/requirements.txt" -c "import nemo_run"
