"""Attention over the paged KV cache: one signature, one implementation a kind of device. Knows tensors only."""
