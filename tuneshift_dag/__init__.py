"""Move a fine-tuned skill from one base model to another with five example prompts."""

import re

__version__ = "0.1.0"
# What would move the cursor, change colours or titles, or turn the order of letters around.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


# The head of a traceback and its indented lines, each perhaps behind what a logger puts before it.
_FRAMES = re.compile(
    r"^.*Traceback \(most recent call last\):.*(?:\n|\Z)(?:(?:\S.*?\] )?[ \t]{2,}.*(?:\n|\Z))*", re.MULTILINE
)


class TuneshiftError(Exception):
    """A problem in the user's input or environment: its text names the file, the key, the value and the repair."""


def without_frames(text: str) -> str:
    """What a process said, and of each traceback in it only the error that it ends with."""
    return _FRAMES.sub("", text)


def visible(text: str) -> str:
    """A text (a model's, a server's, a file's name) with its control characters as numbers, for where they would be
    obeyed."""
    return _CONTROLS.sub(lambda control: f"\\x{ord(control[0]):02x}", text)
