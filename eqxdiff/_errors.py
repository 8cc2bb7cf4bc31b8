"""The errors that a user can cause. Each message is one sentence or list that names the thing and
says what to do; the command line prints it without a traceback."""


class EqxdiffError(Exception):
    """Base of every error that is the input's fault, not the program's."""


class ConfigError(EqxdiffError):
    """A `config.json` (or its like) has a field, or the value of one, that is not supported."""


class CheckpointError(EqxdiffError):
    """A weights file is damaged, or does not hold the tensors that the model needs."""


class SourceError(EqxdiffError):
    """A folder, file or Hub repository cannot be found or may not be read."""


class SettingError(EqxdiffError):
    """A setting is out of range, or would be ignored by the model it is given for."""


class PromptError(EqxdiffError):
    """A prompt cannot be tokenized."""


class DataError(EqxdiffError):
    """A folder of training data lacks images or captions, or an image is broken."""


class TrainingError(EqxdiffError):
    """A run cannot begin or go on: its folder holds another, or its loss is not finite."""


class HostsError(EqxdiffError):
    """A process of several is late, lost, or not given the same as the others."""


def printable(text: str) -> str:
    """Returns a text from a file without what could control a terminal: that is escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
