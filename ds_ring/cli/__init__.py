"""What a user starts: one module a command, and the options, exit codes and last line of output that they share."""
