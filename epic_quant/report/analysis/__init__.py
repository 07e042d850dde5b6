"""Findings and table data, computed from a run: pure functions whose results `sections` show."""
