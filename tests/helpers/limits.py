"""Limits that only a hang exceeds."""

HANG_S = 600.0
"""After which a rank, or a process, that does not answer is taken to hang. Long, as a machine may have other work to
do: what takes longest needs half a minute on an idle one."""
