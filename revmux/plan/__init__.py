"""From trained adapters to the system that is served, within an allowed loss of accuracy."""
