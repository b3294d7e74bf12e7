"""The training loop, and the state to resume it exactly."""
