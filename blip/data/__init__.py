"""Pairs of images and texts: sources -> Batch, in one process or many."""
