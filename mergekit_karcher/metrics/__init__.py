"""Making metrics: from data, or from what an optimizer kept."""
