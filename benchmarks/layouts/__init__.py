"""Whole forwards: one layout measured, several compared, the longest sequence, agreement with the unsharded model."""
