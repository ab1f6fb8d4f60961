"""Triton kernels of the similarity of images and texts, and the operators they are registered as."""
