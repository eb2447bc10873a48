"""N x N computations in float64 or long double. No tensors, no files, no mergekit."""
