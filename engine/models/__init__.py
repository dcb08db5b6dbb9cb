"""Model definitions written for the paged KV pool."""
