#!/usr/bin/env bash
# Makes an environment in which megatron-bridge reads HF directories, for tests/oracle; 150 MB, once:
#
#     bash tools/bridge_oracle/install.sh
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# given no HF directory, export.py imports what it needs, and no more
exec bash "$here/../overlay.sh" bridge_oracle "$here/requirements.txt" "$here/export.py" "$here"
