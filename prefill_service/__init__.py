"""The compute-bound pool: workers that read prompts and offer the KV blocks."""
