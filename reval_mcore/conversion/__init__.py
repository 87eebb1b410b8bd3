"""Hugging Face format <-> megatron-core checkpoints, a part at a time: no whole model in memory, no GPU.

A conversion is published whole or not at all; one that was cut off goes on where it was.
"""
