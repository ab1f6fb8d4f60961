"""Similarity of images and texts: the best query counts."""
