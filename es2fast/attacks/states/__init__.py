"""Attacks on hidden states."""
