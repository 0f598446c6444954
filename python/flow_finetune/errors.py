"""What reaches a user as a message and exit code 2, without a traceback."""


class InputError(Exception):
    """Something the user gave cannot be used; the message names it and the remedy."""


class DivergedError(InputError):
    """A loss is no finite number, in training or of the model that it made."""
