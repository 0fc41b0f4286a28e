"""Typed errors, raised at the borders: config, weights, request, capacity.

A message says what was given, what was expected and what to do. Whoever catches
one prints its text as it is; a traceback adds nothing for the user.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class TinyLLMError(Exception):
    """Base of every error that a user can cause and mend."""


class ConfigError(TinyLLMError):
    """A model, a model's configuration, or an option cannot be used as given."""


class WeightError(TinyLLMError):
    """A checkpoint is missing, incomplete, corrupt, or does not fit its config."""


class RequestError(TinyLLMError):
    """One request is invalid; the engine and every other request go on.

    ``param`` names the argument that is wrong, and ``code`` the kind of fault, for callers that pass both on.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class UsageError(TinyLLMError):
    """An object is used where or when it cannot be: in another thread, in a fork, after it was closed."""


class ContextError(RequestError):
    """A prompt is longer than the context."""


class CapacityError(TinyLLMError):
    """A request can never fit: it needs more memory or context than there is."""


class BusyError(TinyLLMError):
    """Too many requests are waiting already; the same one may be taken later."""


class GroupError(TinyLLMError):
    """Processes that run one model together cannot begin, or go on: who of them, and why."""


class PeerError(TinyLLMError):
    """The process at the other end of a connection is gone, silent, or not the one that was expected."""


def did_you_mean(given: str, options: Iterable[str]) -> str:
    """Return " Did you mean ...?" with the options nearest to ``given``, or ""."""
    near = get_close_matches(given.lower(), list(options), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
