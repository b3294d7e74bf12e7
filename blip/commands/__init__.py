"""The sub-commands of `blip`: one file each, and what they share."""
