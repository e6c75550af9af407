"""API keys: who may ask, and which cache is theirs."""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Caller:
    """Who sent a request, by a digest of the key; the same for all where no key is asked for."""

    digest: bytes
    is_admin: bool = False

    def salt(self, own: str | None) -> bytes:
        """Return the prefix cache's salt: of the key, and of what the caller adds to it.

        HMAC-SHA256(digest of the key, own)

        A caller can split its own cache further by `own`, and never reach another key's.
        """
        return hmac.digest(self.digest, (own or "").encode(), "sha256")


ANYONE = Caller(hashlib.sha256(b"sevenfold: no key").digest(), is_admin=True)


class KeyRing:
    """The keys that a server accepts, kept as digests."""

    def __init__(self, keys: Sequence[str], admin_keys: Sequence[str] = ()) -> None:
        everyone = not admin_keys  # where nobody is named, every caller may do everything
        known = [*((key, everyone) for key in keys), *((key, True) for key in admin_keys)]
        self._callers = [
            Caller(hashlib.sha256(key.encode()).digest(), admin) for key, admin in known
        ]

    def caller(self, authorization: str | None) -> Caller | None:
        """Return who an Authorization header names; None if nobody that may ask.

        Every key is compared, each in constant time.

        Args:
            authorization: `Bearer KEY`, or `Basic` with the key as password (for browsers).
        """
        if not self._callers:
            return ANYONE
        presented = hashlib.sha256(_key_of(authorization or "")).digest()
        matches = [one for one in self._callers if hmac.compare_digest(presented, one.digest)]
        return matches[0] if matches else None


def _key_of(authorization: str) -> bytes:
    scheme, _, rest = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip().encode("latin-1")
    if scheme.lower() != "basic":
        return b""
    try:
        return base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""
