"""Query tokens and text embeddings as the encoder's first rows: see `api.embed_tokens`."""
