"""Streaming passes over tensors: borrowed, never modified, in chunks of bounded size."""
