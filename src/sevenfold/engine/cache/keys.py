"""Names of prefixes: SHA-256 chains over blocks of tokens, salted per caller.

    key_0 = SHA-256(SHA-256(tag, salt), block_0)        key_i = SHA-256(key_(i-1), block_i)

Two requests share a key only if salt and all tokens so far are the same. A predictable hash would
let one caller make another's prefix collide with his own (GHSA-rm76-4mrf-v9r8).
"""

import struct
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from hashlib import sha256

from sevenfold.engine.request import Request

_TAG = b"sevenfold prefix 1\0"
_UNSALTED_TAG = b"sevenfold unsalted block 1\0"
_TOKEN_BYTES = 4


class KeyChain:
    """The keys of one request's blocks, computed when they are asked for."""

    def __init__(self, request: Request, page_tokens: int) -> None:
        self._request, self._page_tokens = request, page_tokens
        self._keys: list[bytes] = []
        self._adopted: tuple[Sequence[bytes], int] = ((), 0)

    def key(self, block: int) -> bytes:
        """Return the key of the prefix that ends with a block, all of whose tokens are known."""
        self._extend(block + 1)
        return self._keys[block]

    def keys(self, num_blocks: int) -> list[bytes]:
        """Return the keys of so many first blocks."""
        self._extend(num_blocks)
        return self._keys[:num_blocks]

    def between(self, first: int, end: int) -> Iterator[bytes]:
        """Return the keys of blocks first to end - 1, computed as they are asked for.

        At most as many are computed in vain as were asked for.
        """
        at = first
        while at < end:
            self._extend(min(2 * at - first + 1, end))
            known = self._keys[at:end]
            yield from known
            at += len(known)

    @property
    def start(self) -> tuple[bytes, bytes]:
        """Salt and tokens of the first block: by them trails are found."""
        request, width = self._request, self._block_bytes
        # Of a prompt that is shorter than a block, outputs are a part.
        first = request.packed[:width]
        return request.salt, first if len(first) == width else self.packed(1)

    def adopt(self, keys: Sequence[bytes], count: int) -> None:
        """Take so many first keys from a request whose salt and tokens there are the same.

        They are copied when they are asked for: the next turn of a chat asks for none.
        """
        self._adopted = (keys, count)

    def packed(self, num_blocks: int) -> bytes:
        """Return the tokens of so many first blocks, 4 bytes each."""
        inside = min(num_blocks, self._num_whole)
        blocks = [self._block(block) for block in range(inside, num_blocks)]
        return b"".join((self._view(inside), *blocks))

    def num_common(self, packed: bytes, least: int, most: int) -> int:
        """Return how many first blocks of the prompt, at most so many, are another's packed tokens.

        0 if they are no more than least, which is seen at once.
        """
        most = min(most, self._num_whole, len(packed) // self._block_bytes)
        if most <= least:
            return 0
        own, width = self._view(most), self._block_bytes
        first = least * width
        if not packed.startswith(own[first : first + width], first):
            return 0
        if packed.startswith(own):
            return most
        ends = range(width, most * width + 1, width)
        found = bisect_left(ends, True, key=lambda end: not packed.startswith(own[:end]))
        return found if found > least else 0

    def unsalted(self) -> bytes:
        """Return a key of the first block that does not depend on the salt."""
        return sha256(_UNSALTED_TAG + self._block(0)).digest()

    @property
    def _block_bytes(self) -> int:
        return _TOKEN_BYTES * self._page_tokens

    @property
    def _num_whole(self) -> int:
        """Blocks of which the prompt has every token."""
        return len(self._request.prompt) // self._page_tokens

    def _extend(self, count: int) -> None:
        keys, width = self._keys, self._block_bytes
        if len(keys) < count and len(keys) < self._adopted[1]:
            keys += self._adopted[0][len(keys) : self._adopted[1]]
        key = keys[-1] if keys else sha256(_TAG + self._request.salt).digest()
        inside = min(count, self._num_whole)
        if len(keys) < inside:
            # One loop without calls of our own: a long prompt has thousands of blocks.
            packed = self._view(inside)
            for at in range(len(keys) * width, inside * width, width):
                key = sha256(key + packed[at : at + width]).digest()
                keys.append(key)
        while len(keys) < count:
            key = sha256(key + self._block(len(keys))).digest()
            keys.append(key)

    def _view(self, num_blocks: int) -> memoryview:
        """So many first blocks, which the prompt has."""
        return memoryview(self._request.packed)[: num_blocks * self._block_bytes]

    def _block(self, block: int) -> bytes:
        first, size = block * self._page_tokens, self._page_tokens
        tokens = self._request.tokens_between(first, first + size)
        return struct.pack(f"<{size}I", *tokens)
