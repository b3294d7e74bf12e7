"""Scoring: decode, caption, match, one part at a time."""
