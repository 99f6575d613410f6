"""What is learned of a model, scheduler and grid of steps at the block level, and where it is kept."""
