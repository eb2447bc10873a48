"""All that knows mergekit."""
