"""Owns what an operator may set about serving, and checks it. Knows no HTTP library."""

from __future__ import annotations

from dataclasses import dataclass

from tiny_llm.errors import ConfigError
from tiny_llm.limits import check_number, check_whole

MAX_N = 32  # answers to one prompt
MAX_PROMPTS = 64  # prompts of one request
MAX_INPUTS = 2048  # texts of one request to /v1/embeddings; as OpenAI has it
MAX_ANSWERS = 128  # answers of one request, over all its prompts
MAX_LOGPROBS = 20  # of the likeliest tokens reported beside a chosen one
MAX_STOPS = 16  # stop strings, each of at most ``MAX_STOP_LENGTH`` characters
MAX_STOP_LENGTH = 256
MAX_LISTED = 64  # entries of another list of a request's, such as stop_token_ids
MAX_BIASES = 1024  # entries of a logit_bias
MAX_FIELDS = 256  # fields of one object that has names of ours: far more than there are
MAX_LABELS = 16  # entries of a request's metadata
MAX_IDS = 2**17  # token ids of one request to /detokenize
MAX_MESSAGES = 2048  # messages of one conversation
MAX_TOOLS = 128  # functions that one request may offer


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Limits and secrets. ``name`` is what clients call the model: an alias, never a path.

    ``api_keys``: with any, all but /health and the page needs one. ``max_in_flight`` requests are held
    at a time; a body has at most ``max_body_bytes`` and arrives, as do its headers, within
    ``read_timeout_s``. After a signal, requests have ``drain_s`` to end. ``cors_origins`` are the
    other sites whose pages may call us. ``aliases`` are patterns of other names for the model: "claude-*".

    Raises ConfigError for a value that cannot work.
    """

    name: str = "demo"
    api_keys: tuple[str, ...] = ()
    max_in_flight: int = 512
    max_body_bytes: int = 4 * 2**20
    max_headers: int = 100
    max_header_bytes: int = 2**14
    read_timeout_s: float = 30.0
    drain_s: float = 30.0
    compile_timeout_s: float = 10.0
    cors_origins: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if any(not key or not key.isascii() or not key.isprintable() for key in self.api_keys):
            raise ConfigError("An --api-key is empty or has characters other than printable ASCII.")
        for name in ("max_in_flight", "max_body_bytes", "max_headers", "max_header_bytes"):
            check_whole(name, getattr(self, name))
        for name in ("read_timeout_s", "compile_timeout_s"):
            check_number(name, getattr(self, name))
        check_number("drain_s (--drain-seconds)", self.drain_s, zero=True)
