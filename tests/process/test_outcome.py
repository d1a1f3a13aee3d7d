"""What a rank tells, and where it does not."""

import os

from ds_ring.process.outcome import OURS, VARIABLE, Outcomes, Told, tell


def test_a_rank_tells_the_command_that_launched_it(monkeypatch):
    with Outcomes() as outcomes:
        monkeypatch.setenv(VARIABLE, outcomes.environment[VARIABLE])
        monkeypatch.setenv("RANK", "3")
        tell(OURS)
        assert outcomes.told() == [Told(3, OURS, None)]


def test_a_file_that_is_not_the_commands_is_left_alone(monkeypatch, tmp_path):
    """On another host the path may lead to whatever a process there has opened."""
    file = tmp_path / "log"
    file.write_text("theirs")
    with file.open("a") as theirs:
        monkeypatch.setenv(VARIABLE, f"/proc/{os.getpid()}/fd/{theirs.fileno()}")
        tell(OURS)
    assert file.read_text() == "theirs"
