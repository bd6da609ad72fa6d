"""Attacks on weights: what whoever holds the model's files can do to them."""
