"""The command `mergekit-karcher`."""
