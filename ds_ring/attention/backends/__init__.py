"""One block of attention by the fastest kernel that serves it."""
