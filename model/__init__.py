"""The full BLIP-2 system."""
