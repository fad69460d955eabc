"""Where a backbone comes from, how it is loaded, and what identifies it."""
