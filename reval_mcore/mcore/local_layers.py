"""Layer parts for machines without Transformer Engine, in plain torch: an RMSNorm and a packed core attention.

megatron-core's own norm refuses sequence parallelism and its own core attention refuses packed sequences.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from reval_mcore.mcore.packing import Cut


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
    padding at most doubles the work. It stands on the right, where causal attention of real positions never looks.
    Under context parallelism each rank holds its positions of every sequence (packing.Cut), gathers the keys and values
    of all, and attends from its own.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        assert config.kv_channels is not None
        assert pg_collection is not None
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self._group = pg_collection.cp
        self._size, self._rank = self._group.size(), self._group.rank()

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
        """query [T, heads, d], key and value [T, groups, d], of the T positions here -> [T, heads * d]."""
        assert packed_seq_params is not None, "PackedAttention takes packed sequences only"
        cu_seqlens = packed_seq_params.cu_seqlens_q
        if self._size > 1:
            order = self._gathered_order(cu_seqlens)
            key, value = (gather_from_sequence_parallel_region(x, group=self._group)[order] for x in (key, value))
        buckets: dict[int, list[tuple[int, int]]] = {}  # (start, length) of the sequences, by bit length of the length
        for start, end in itertools.pairwise(cu_seqlens.tolist()):
            buckets.setdefault((end - start - 1).bit_length(), []).append((start, end - start))
        out = query.new_empty(query.shape[0], query.shape[1] * query.shape[2])
        parts = [self._attend(query, key, value, members) for members in buckets.values()]
        slots, values = (torch.cat(list(part)) for part in zip(*parts, strict=True))
        return out.index_copy(0, slots, values)

    def _gathered_order(self, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """int64: for each position of the pack, its place among those gathered rank by rank."""
        ends = cu_seqlens.cpu().numpy()
        held = np.concatenate([Cut(self._size, rank).positions(ends) for rank in range(self._size)])
        return torch.from_numpy(np.argsort(held)).to(cu_seqlens.device)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, members: list[tuple[int, int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(int64 [n] places of these sequences' positions here, [n, heads * d] their outputs)."""
        starts, lengths = torch.tensor(members, device=query.device).unbind(1)
        longest = max(length for _, length in members)
        here, places, positions = self._rows(starts, lengths, longest)
        column = torch.arange(longest, device=query.device)
        everywhere = torch.where(column < lengths[:, None], starts[:, None] + column, 0)  # padding repeats token 0
        out = F.scaled_dot_product_attention(
            _padded(query, torch.where(here, places, 0)),
            _padded(key, everywhere),
            _padded(value, everywhere),
            attn_mask=None if self._size == 1 else (column <= positions[..., None])[:, None],
            is_causal=self._size == 1,
            scale=self.scale,
            enable_gqa=key.shape[-2] != query.shape[-2],
        )
        return places[here], out.transpose(1, 2).flatten(2)[here]

    def _rows(
        self, starts: torch.Tensor, lengths: torch.Tensor, longest: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, longest / ranks] each: whether there is a query, its place here, and its position in its sequence."""
        column = torch.arange(longest // self._size, device=starts.device)
        here = column < lengths[:, None] // self._size
        places = starts[:, None] // self._size + column
        chunk = lengths[:, None] // (2 * self._size)
        late = lengths[:, None] - (self._rank + 2) * chunk + column
        positions = column if self._size == 1 else torch.where(column < chunk, self._rank * chunk + column, late)
        return here, places, positions


def _padded(packed: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Rows `source` [B, n] of packed [T, heads, d], as [B, heads, n, d]."""
    rows = packed.index_select(0, source.flatten())
    return rows.view(*source.shape, *packed.shape[1:]).transpose(1, 2)
