"""reval_mcore: off-policy, value-based RL post-training of LLMs (ReVal) on megatron-core."""

__version__ = "0.1.0"
