#!/usr/bin/env bash
# Serves a model without a GPU:   bash tools/sglang_cpu/serve.sh MODEL_DIR --port N [flags of SGLang]
#
# MODEL_DIR is in Hugging Face format. The server idles without load, and gives log-probabilities at temperature 1.
# It holds 8192 tokens at a time in fp32; stop it with SIGTERM or Ctrl-C.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
python=$repo/.sglang_cpu/bin/python
[[ -d ${1:-} ]] || { sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
[[ -x $python ]] || { echo "tools/sglang_cpu/serve.sh: no SGLang for CPU yet; make it: bash tools/sglang_cpu/install.sh" >&2; exit 1; }
model=$1
shift

export SGLANG_USE_CPU_ENGINE=1 SGLANG_RETURN_ORIGINAL_LOGPROB=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m sglang.launch_server --model-path "$model" --device cpu --dtype float32 \
    --attention-backend torch_native --sampling-backend pytorch --grammar-backend none --disable-overlap-schedule \
    --max-total-tokens 8192 --max-running-requests 32 --mem-fraction-static 0.1 \
    --sleep-on-idle --skip-server-warmup "$@"
