"""Metrics, without models."""
