"""Devices, files, text and progress: nothing of attention or models."""
