"""Masked self-attention of queries and packed texts."""
