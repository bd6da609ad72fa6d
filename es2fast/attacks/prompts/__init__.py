"""Attacks on the prompt: what stands before, around or after the request."""
