"""LayerNorm of a residual sum: see `api.add_layer_norm`."""
