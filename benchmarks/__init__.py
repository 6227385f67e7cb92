"""Measurements: each module prints a table and writes one result file."""
