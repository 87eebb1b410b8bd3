"""Layer parts for machines without Transformer Engine, in plain torch: an RMSNorm and a packed core attention.

megatron-core's own norm refuses sequence parallelism and its own core attention refuses packed sequences.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule


class RMSNorm(torch.nn.Module):
    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # finalize_model_grads all-reduces the gradients of marked weights over tensor-parallel ranks
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden, (hidden.shape[-1],), self.weight, self.eps)


class PackedAttention(MegatronModule):
    """Causal attention over packed sequences (THD) on torch's scaled_dot_product_attention.

    Sequences of like length (of the same power of two) are laid out as rows of one padded batch for a single call, so
    padding at most doubles the work. It stands on the right, where causal attention of real positions never looks, so
    no mask is needed and padding changes nothing.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        assert config.context_parallel_size == 1, "PackedAttention sees whole sequences"
        assert config.kv_channels is not None
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """query [T, heads, d], key and value [T, groups, d] -> [T, heads * d]."""
        assert packed_seq_params is not None, "PackedAttention takes packed sequences only"
        ends = packed_seq_params.cu_seqlens_q.tolist()
        buckets: dict[int, list[tuple[int, int]]] = {}  # (start, length) of the sequences, by bit length of the length
        for start, end in itertools.pairwise(ends):
            buckets.setdefault((end - start - 1).bit_length(), []).append((start, end - start))
        out = query.new_empty(query.shape[0], query.shape[1] * query.shape[2])
        parts = [self._attend(query, key, value, members) for members in buckets.values()]
        slots, values = (torch.cat(list(part)) for part in zip(*parts, strict=True))
        return out.index_copy(0, slots, values)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, members: list[tuple[int, int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(int64 [n] places of these sequences' tokens in the pack, [n, heads * d] their outputs)."""
        starts, lengths = torch.tensor(members, device=query.device).unbind(1)
        longest = max(length for _, length in members)
        column = torch.arange(longest, device=query.device)
        is_real = column < lengths[:, None]  # [B, longest]
        places = starts[:, None] + column
        source = torch.where(is_real, places, 0).flatten()  # padding repeats token 0; its output is dropped

        def padded(packed: torch.Tensor) -> torch.Tensor:
            rows = packed.index_select(0, source)
            return rows.view(len(members), longest, *rows.shape[1:]).transpose(1, 2)

        out = F.scaled_dot_product_attention(
            padded(query),
            padded(key),
            padded(value),
            is_causal=True,
            scale=self.scale,
            enable_gqa=key.shape[-2] != query.shape[-2],
        )
        return places[is_real], out.transpose(1, 2).flatten(2)[is_real]
