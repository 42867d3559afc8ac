"""Attention over the paged KV cache, one signature with an implementation a kind of device, and the passes around
8-bit matrix products. Knows tensors only."""
