"""Reports on the texts that a selection keeps and drops, in numbers and images."""
