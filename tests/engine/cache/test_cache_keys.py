"""Keys are equal when, and only when, salt and tokens are."""

from hashlib import sha256

from cache_helpers import P
from hypothesis import given, settings
from hypothesis import strategies as st

from sevenfold.engine.cache.keys import KeyChain
from sevenfold.engine.request import Request

TOKENS = st.lists(st.integers(0, 1), min_size=3 * P, max_size=3 * P)


def chain(prompt, generated=(), salt: bytes = b"") -> KeyChain:
    request = Request("r", tuple(prompt), 100, salt=salt)
    request.generated.extend(generated)
    return KeyChain(request, P)


@settings(deadline=None)
@given(
    a=TOKENS, b=TOKENS, shared=st.integers(0, 3 * P), salts=st.tuples(*[st.binary(max_size=2)] * 2)
)
def test_a_key_stands_for_a_salt_and_a_prefix(a, b, shared, salts) -> None:
    b = a[:shared] + b[shared:]
    one, other = chain(a, salt=salts[0]), chain(b, salt=salts[1])
    for block in range(3):
        end = (block + 1) * P
        same = salts[0] == salts[1] and a[:end] == b[:end]
        assert (one.key(block) == other.key(block)) == same
    assert (one.unsalted() == other.unsalted()) == (a[:P] == b[:P])
    assert one.unsalted() != one.key(0)


@settings(deadline=None)
@given(tokens=TOKENS, border=st.integers(1, 3 * P))
def test_it_does_not_matter_who_wrote_the_tokens(tokens, border) -> None:
    whole, split = chain(tokens), chain(tokens[:border], tokens[border:])
    assert [whole.key(block) for block in range(3)] == [split.key(block) for block in range(3)]


def test_the_chain_is_that_of_the_documentation() -> None:
    tokens = range(2 * P)
    packed = [b"".join(t.to_bytes(4, "little") for t in tokens[i : i + P]) for i in (0, P)]
    key = sha256(b"sevenfold prefix 1\0" + b"salt").digest()
    for block in range(2):
        key = sha256(key + packed[block]).digest()
    assert chain(tokens, salt=b"salt").key(1) == key
