"""Objectives: the losses, and the batches that they take."""
