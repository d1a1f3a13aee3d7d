"""Attention over sharded sequences, written against Transport; knows neither models nor engines."""
