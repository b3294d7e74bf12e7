"""Thresholds chosen from audited samples."""
