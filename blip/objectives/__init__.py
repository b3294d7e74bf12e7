"""What is learned: losses and what they need of a batch."""
