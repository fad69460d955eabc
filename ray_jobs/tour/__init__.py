"""The parts of the quickstart."""
