"""Weights: where they are, what they are, how they are loaded. Nothing here decodes or trains."""
