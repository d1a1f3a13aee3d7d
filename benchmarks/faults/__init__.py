"""What is left of a run when one of its processes is killed or stopped."""
