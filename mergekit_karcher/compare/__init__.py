"""Which merge is best for some models, measured on a little text."""
