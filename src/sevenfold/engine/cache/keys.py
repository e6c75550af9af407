"""Names of prefixes: SHA-256 chains over blocks of tokens, salted per caller.

    key_0 = SHA-256(SHA-256(tag, salt), block_0)        key_i = SHA-256(key_(i-1), block_i)

Two requests share a key only if salt and all tokens so far are the same. A predictable hash would
let one caller make another's prefix collide with his own (GHSA-rm76-4mrf-v9r8).
"""

import struct
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
        self._adopted: tuple[Sequence[bytes], int] = ((), 0)
        self._own: list[bytes] = []  # behind the adopted ones

    def key(self, block: int) -> bytes:
        """Return the key of the prefix that ends with a block, all of whose tokens are known."""
        adopted, count = self._adopted
        if block < count:
            return adopted[block]
        self._extend(block + 1)
        return self._own[block - count]

    def keys(self, num_blocks: int) -> list[bytes]:
        """Return the keys of so many first blocks."""
        return self._known(0, num_blocks)

    def between(self, first: int, end: int) -> Iterator[bytes]:
        """Return the keys of blocks first to end - 1, computed as they are asked for.

        At most as many are computed in vain as were asked for.
        """
        at = first
        while at < end:
            known = self._known(at, min(2 * at - first + 1, end))
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

        Before any is asked for. They are not copied: the next turn of a chat asks for the last.
        """
        self._adopted = (keys, count)

    def packed(self, num_blocks: int) -> bytes:
        """Return the tokens of so many first blocks, 4 bytes each."""
        inside = min(num_blocks, self._num_whole)
        blocks = [self._block(block) for block in range(inside, num_blocks)]
        return b"".join((self._view(inside), *blocks))

    def closest(self, others: Sequence[bytes], most: int) -> tuple[int, int]:
        """Find the packed tokens, of several, that have most first blocks of the prompt.

        Returns:
            How many, at most so many, and which, the first of those that have as many.
        """
        width, most = self._block_bytes, min(most, self._num_whole)
        own, best, found = self._view(most), 0, 0
        following = own[:width]
        for n, packed in enumerate(others):
            # Most differ in the next block from those before, which is seen at once.
            if best < most and packed.startswith(following, best * width):
                common = _num_common(own, packed, width)
                if common > best:
                    best, found = common, n
                    following = own[best * width : (best + 1) * width]
        return best, found

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

    def _known(self, first: int, end: int) -> list[bytes]:
        """The keys of blocks first to end - 1."""
        self._extend(end)
        adopted, count = self._adopted
        own = self._own[max(first - count, 0) : max(end - count, 0)]
        return [*adopted[first : min(end, count)], *own]

    def _extend(self, num_blocks: int) -> None:
        adopted, count = self._adopted
        own, width, known = self._own, self._block_bytes, count + len(self._own)
        if known >= num_blocks:
            return
        if own:
            key = own[-1]
        else:
            key = adopted[count - 1] if count else sha256(_TAG + self._request.salt).digest()
        inside = min(num_blocks, self._num_whole)
        if known < inside:
            # One loop without calls of our own: a long prompt has thousands of blocks.
            packed = self._view(inside)
            for at in range(known * width, inside * width, width):
                key = sha256(key + packed[at : at + width]).digest()
                own.append(key)
        for block in range(max(known, inside), num_blocks):
            key = sha256(key + self._block(block)).digest()
            own.append(key)

    def _view(self, num_blocks: int) -> memoryview:
        """So many first blocks, which the prompt has."""
        return memoryview(self._request.packed)[: num_blocks * self._block_bytes]

    def _block(self, block: int) -> bytes:
        first, size = block * self._page_tokens, self._page_tokens
        tokens = self._request.tokens_between(first, first + size)
        return struct.pack(f"<{size}I", *tokens)


def _num_common(own: memoryview, other: bytes, width: int) -> int:
    """How many first blocks are the same."""
    least, most = 0, min(len(own), len(other)) // width
    if other.startswith(own[: most * width]):
        return most
    while most - least > 1:
        middle = (least + most) // 2
        if other.startswith(own[least * width : middle * width], least * width):
            least = middle
        else:
            most = middle
    return least
