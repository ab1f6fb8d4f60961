"""Attention to image features that are keys and values at once: the absorbed form of cross-attention."""
