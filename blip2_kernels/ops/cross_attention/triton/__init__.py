"""Triton kernels of query-to-image cross-attention, and the operators they are registered as."""
