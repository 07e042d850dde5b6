"""Findings and table data, computed from a run: pure functions, of which `sections` show the results."""
