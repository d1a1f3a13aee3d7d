"""The planner held against what GPUs recorded: the constants that it is fitted with, and its errors."""
