"""Adapters on disk and on their backbone."""
