"""Triton kernels of masked self-attention, and the operators they are registered as."""
