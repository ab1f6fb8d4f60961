"""Bias and exact GELU: see `api.bias_gelu`."""
