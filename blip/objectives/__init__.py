"""Objectives: the losses, and what they need from a batch."""
