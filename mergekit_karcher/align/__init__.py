"""Permutation symmetries: networks that compute alike with their neurons in another order."""
