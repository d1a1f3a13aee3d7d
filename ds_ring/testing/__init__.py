"""Transports for tests: ranks as threads, and ranks that share a GPU."""
