"""What ranks send in a pass: left out of it, or recorded and done again alone."""
