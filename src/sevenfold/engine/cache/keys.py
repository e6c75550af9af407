"""Names of prefixes: SHA-256 chains over blocks of tokens, salted per caller.

    key_0 = SHA-256(SHA-256(tag, salt), block_0)        key_i = SHA-256(key_(i-1), block_i)

Two requests share a key only if salt and all tokens so far are the same. A predictable hash would
let one caller make another's prefix collide with his own (GHSA-rm76-4mrf-v9r8).
"""

import struct
from collections.abc import Iterator
from hashlib import sha256

from sevenfold.engine.request import Request

_TAG = b"sevenfold prefix 1\0"
_UNSALTED_TAG = b"sevenfold unsalted block 1\0"


class KeyChain:
    """The keys of one request's blocks, computed when they are asked for."""

    def __init__(self, request: Request, page_tokens: int) -> None:
        self._request = request
        self._page_tokens = page_tokens
        self._pack = struct.Struct(f"<{page_tokens}I").pack
        self._root = sha256(_TAG + request.salt).digest()
        self._keys: list[bytes] = []

    def key(self, block: int) -> bytes:
        """Return the key of the prefix that ends with a block, all of whose tokens are known."""
        self._extend(block + 1)
        return self._keys[block]

    def first(self, count: int) -> Iterator[bytes]:
        """Return the keys of so many first blocks, computed as they are asked for.

        At most as many are computed in vain as were asked for.
        """
        given = 0
        while given < count:
            self._extend(min(2 * given + 1, count))
            known = self._keys[given:count]
            yield from known
            given += len(known)

    def unsalted(self) -> bytes:
        """Return a key of the first block that does not depend on the salt."""
        return sha256(_UNSALTED_TAG + self._block(0)).digest()

    def _extend(self, count: int) -> None:
        keys, prompt, size, pack = self._keys, self._request.prompt, self._page_tokens, self._pack
        key = keys[-1] if keys else self._root
        # One loop without calls of our own: a long prompt has thousands of blocks.
        inside = min(count, len(prompt) // size) * size
        for first in range(len(keys) * size, inside, size):
            key = sha256(key + pack(*prompt[first : first + size])).digest()
            keys.append(key)
        while len(keys) < count:
            key = sha256(key + self._block(len(keys))).digest()
            keys.append(key)

    def _block(self, block: int) -> bytes:
        prompt, generated = self._request.prompt, self._request.generated
        first, end = block * self._page_tokens, (block + 1) * self._page_tokens
        inside = len(prompt)
        if end <= inside:
            return self._pack(*prompt[first:end])
        return self._pack(*prompt[first:], *generated[max(0, first - inside) : end - inside])
