"""What megatron-bridge makes of HF directories: `.bridge_oracle/bin/python tools/bridge_oracle/export.py OUT [HF ...]`

Writes OUT/NAME.safetensors for each directory .../NAME: every parameter of a megatron-core model of one rank under its
global name, and in the metadata, as JSON under "config", what the bridge read in config.json. It knows nothing of this
project: an independent opinion for tests/oracle. config.json has to be one that transformers 4 reads right.

megatron-bridge wants Transformer Engine and triton, which a machine without a GPU does not have. Names of them are lent
to it while it is imported; nothing here calls them. Of Transformer Engine's layers only the names of the parameters
matter, so the fused linear layer below has these, and cannot be run.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

import torch
import transformers  # noqa: F401  (before triton seems to be there, which it looks for)
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from safetensors.torch import save_file

# of the model, as megatron-core calls them; to be held against what others read in the same config.json
CONFIG_FIELDS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("vocab_size", "seq_length", "layernorm_epsilon", "rotary_base", "rope_scaling", "rope_scaling_factor"),
    *("share_embeddings_and_output_weights", "add_qkv_bias", "qk_layernorm", "add_bias_linear", "normalization"),
    "gated_linear_unit",
)


@contextlib.contextmanager
def absent_packages() -> Iterator[None]:
    """Within it, Transformer Engine and triton import, with what megatron-bridge names while it is imported."""
    names = ("transformer_engine", "transformer_engine.pytorch", "triton", "triton.language")
    lent = {name: module_from_spec(ModuleSpec(name, None)) for name in names}
    te, te_torch, triton, language = lent.values()
    layer = torch.nn.Module
    te.__dict__.update(pytorch=te_torch)
    te_torch.__dict__.update(Linear=layer, LayerNormLinear=layer, ops=types.SimpleNamespace(Sequential=layer))
    triton.__dict__.update(jit=lambda kernel: kernel, language=language)
    language.__dict__.update(constexpr=int)
    sys.modules.update(lent)
    try:
        yield
    finally:
        for name in lent:
            del sys.modules[name]


with absent_packages():
    from megatron.bridge import AutoBridge  # pyright: ignore[reportMissingImports]  (in its own environment)


class TELayerNormColumnParallelLinear(ColumnParallelLinear):
    """The parameters of Transformer Engine's layer of this name, by which megatron-bridge knows how it is cut."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        self.layer_norm_weight = torch.nn.Parameter(torch.empty(input_size, dtype=config.params_dtype))


def layer_spec(config: Any) -> Any:
    """A layer that has the parameters of Transformer Engine's."""
    layer: Any = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
    parts.self_attention.submodules.linear_qkv = TELayerNormColumnParallelLinear
    parts.mlp.submodules.linear_fc1 = TELayerNormColumnParallelLinear
    return layer


def export(directory: Path, out: Path) -> None:
    """One HF directory into one file."""
    bridge = AutoBridge.from_hf_pretrained(directory)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.transformer_layer_spec = layer_spec
    provider.use_cpu_initialization = True
    provider.perform_initialization = False
    # kernels that need a GPU
    provider.apply_rope_fusion = provider.gradient_accumulation_fusion = provider.persist_layer_norm = False
    provider.finalize()  # derives some fields from others
    config = {name: getattr(provider, name) for name in CONFIG_FIELDS}
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    model = provider.provide(pre_process=True, post_process=True).to(provider.params_dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)  # so that one that is left out is seen
    bridge.load_hf_weights([model])
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    save_file(tensors, out / f"{directory.name}.safetensors", metadata={"config": json.dumps(config)})


def main(out: Path, directories: list[Path]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    for directory in directories:
        export(directory, out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
