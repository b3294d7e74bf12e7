"""Sub-commands of `blip`, one file each."""
