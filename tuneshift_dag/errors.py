"""The one exception that means "you can fix this": its text names the file, key, value and repair."""


class TuneshiftError(Exception):
    """A problem in the user's input or environment, told with its repair."""
