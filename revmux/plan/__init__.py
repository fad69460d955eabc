"""Choosing the system to serve among trained adapters, within an allowed loss of accuracy."""
