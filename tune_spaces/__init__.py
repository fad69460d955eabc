"""Search spaces over the methods and their settings."""
