"""Arithmetic before a run: which layouts can work, their step time, memory and bytes sent."""
