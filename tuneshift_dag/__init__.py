"""Move a fine-tuned skill from one base model to another with five example prompts."""

__version__ = "0.1.0"


class TuneshiftError(Exception):
    """A problem in the user's input or environment: its text names the file, the key, the value and the repair."""
