"""Selecting: which captions stay."""
