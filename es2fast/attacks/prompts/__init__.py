"""Attacks on what the model reads: text, and embeddings in place of text."""
