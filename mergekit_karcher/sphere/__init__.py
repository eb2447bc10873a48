"""The mean on the sphere, from N x N inner products: numpy only."""
