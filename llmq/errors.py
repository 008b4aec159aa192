"""Every failure a user can cause, one line each: where, what, what to do.

LlmqError                      the CLI prints it as one line and exits with status 1
|-- SourceError                model path, config, tokenizer or weights cannot be used
|   `-- NonFiniteError         a weight or an activation is NaN or infinite (names it)
|-- SchemeError                bits, group size or symmetry that cannot hold this layer
|-- CalibrationError           text that is missing, empty or too short
|-- OutputError                the output exists, is not empty, or cannot be written
|-- IntegrityError             what was computed or written is not usable; no folder was made
|-- MemoryLimitError           this machine has too little memory for this run
|-- ProcessError               another process of the same run has ended
|-- FormatError                a checkpoint on disk that is not what it claims to be
|-- BackendError               a backend named by the user cannot run this layer (`why_not`)
|-- HubError                   the Hub cannot be reached, or does not let you write there
`-- MissingPackageError        an optional package that this needs is not installed
"""


class LlmqError(Exception):
    """Base of every error that is the user's to fix; its text says where, what and what to do."""


class SourceError(LlmqError):
    """The model to read cannot be used: path, architecture, tokenizer or weights."""


class NonFiniteError(SourceError):
    """A weight or an activation is NaN or infinite; the text names the tensor."""


class SchemeError(LlmqError, ValueError):
    """Bits, group size or symmetry that no checkpoint, or not this layer, can hold."""


class CalibrationError(LlmqError):
    """Calibration or evaluation text that is missing, empty or too short."""


class OutputError(LlmqError):
    """The output folder exists, is not empty, or cannot be written."""


class IntegrityError(LlmqError):
    """What was computed or written is not usable: it would be garbage. No folder was made."""


class MemoryLimitError(LlmqError):
    """This machine has too little memory for what was asked."""


class ProcessError(LlmqError):
    """Another process of the same run has ended."""


class FormatError(LlmqError):
    """A checkpoint on disk that is not what it claims to be."""


class BackendError(LlmqError):
    """A backend that the user named cannot run this layer; the text is its `why_not`."""


class HubError(LlmqError):
    """The Hub cannot be reached, there is no token, or the repository is not yours to write."""


class MissingPackageError(LlmqError):
    """An optional package that this needs is not installed; the text says how to install it."""
