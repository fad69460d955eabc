"""Benchmarks: each command writes a file in results/, and the page module writes their figures into the pages."""
