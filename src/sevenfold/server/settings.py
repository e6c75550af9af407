"""What whoever starts a server decides."""

import ipaddress
from typing import Annotated, Self

from pydantic import Field, model_validator

from sevenfold.config import StrictModel

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
MIN_KEY_CHARS = 16
Key = Annotated[str, Field(min_length=MIN_KEY_CHARS)]


class ServerSettings(StrictModel):
    """What whoever starts a server decides.

    host: address to listen on; other than this machine alone (loopback) needs api_keys.
    port: 0 takes a free one.
    api_keys: one of them must come with each request, but for /health; empty asks for none.
    admin_keys: keys that may do what api_keys may, and alone read /metrics and empty the cache;
        empty lets every caller do so.
    max_requests: outputs under way or waiting at most; more get 429.
    max_choices: outputs of one request at most, over its prompts and n.
    max_body_bytes: of a request's body.
    body_timeout_s: for a request's body to arrive.
    max_messages: of a conversation.
    max_grammar_chars: of a schema or grammar that constrains an output.
    max_regex_chars: of a regular expression that does.
    max_default_tokens: new tokens of a chat answer that names no max_tokens.
    max_deadline_s: seconds for a request; also of those that name no deadline_s.
    template_timeout_s: to render a chat template.
    grammar_timeout_s: to compile a grammar.
    stall_s: of an engine that has work and computes nothing, until /health turns red.
    drain_s: for requests under way to end after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_keys: tuple[Key, ...] = ()
    admin_keys: tuple[Key, ...] = ()
    max_requests: Count = 256
    max_choices: Count = 128
    max_body_bytes: Count = 16 << 20
    body_timeout_s: Seconds = 60.0
    max_messages: Count = 4096
    max_grammar_chars: Count = 65_536
    max_regex_chars: Count = 1024
    max_default_tokens: Count = 4096
    max_deadline_s: Seconds = 3600.0
    template_timeout_s: Seconds = 5.0
    grammar_timeout_s: Seconds = 5.0
    stall_s: Seconds = 300.0
    drain_s: Seconds = 30.0

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.on_loopback and not self.api_keys:
            raise ValueError(
                "api_keys must be given to listen beyond this machine, got none for host "
                f"{self.host!r}"
            )
        if self.admin_keys and not self.api_keys:
            raise ValueError("admin_keys must be left out without api_keys, got some")
        both = len(set(self.admin_keys) & set(self.api_keys))
        if both:
            raise ValueError(f"admin_keys must be other keys than api_keys, got {both} in both")
        if self.max_choices > self.max_requests:
            raise ValueError(
                f"max_choices must be at most max_requests = {self.max_requests}, got "
                f"{self.max_choices}"
            )
        return self


def is_loopback(host: str) -> bool:
    """Whether a host's name or address means this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
