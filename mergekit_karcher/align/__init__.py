"""Aligning networks: their neurons are permuted, which leaves what they compute as it is."""
