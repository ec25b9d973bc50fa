"""Training: state, steps, schedules, checkpoints, writers and the one train loop."""
