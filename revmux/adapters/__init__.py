"""Adapters: saving, loading, publishing and use."""
