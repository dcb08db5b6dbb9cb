"""The memory-bound pool: workers that pull KV blocks and generate with continuous batching."""
