"""The steps of the quickstart."""
