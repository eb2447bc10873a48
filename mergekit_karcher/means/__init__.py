"""SphereMeans of tensors: tensors in, tensor out."""
