"""Everything that touches megatron-core: model, packing, loss head, optimizer, reference, checkpoints, the learner."""
