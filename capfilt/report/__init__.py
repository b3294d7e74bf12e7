"""Reports of what a selection keeps and drops, in numbers and images."""
