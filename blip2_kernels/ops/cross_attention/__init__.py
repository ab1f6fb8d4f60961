"""Cross-attention of query tokens to image tokens."""
