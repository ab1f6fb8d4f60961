"""Triton kernels of latent attention, and the operator they are registered as."""
