"""The replay buffer: immutable Parquet shards, an admission journal, samplers, and the in-memory index over them."""
