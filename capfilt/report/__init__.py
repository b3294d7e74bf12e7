"""What a selection keeps and drops, in numbers and images."""
