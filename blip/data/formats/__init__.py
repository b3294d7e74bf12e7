"""File formats: rows in, records out."""
