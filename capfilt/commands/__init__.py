"""Verbs of `capfilt`, one file each."""
