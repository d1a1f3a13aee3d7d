"""Launched processes: starting them, and ending them when a launcher or another rank is gone."""
