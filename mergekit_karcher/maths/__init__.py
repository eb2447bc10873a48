"""N x N computations in float64. No tensors, no files, no mergekit."""
