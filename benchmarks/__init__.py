"""Measurements: each command writes a file in results/, and page puts the files into the pages."""
