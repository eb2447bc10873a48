"""Merging by metrics other than the sphere's: which parameters each model is sure of."""
