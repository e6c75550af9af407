"""Text to token shards, and token shards to packed training samples."""

from sevenfold.data.bundled import austen_paths
from sevenfold.data.dataset import TokenDataset
from sevenfold.data.length_slice import LengthSlice
from sevenfold.data.loader import IGNORED_LABEL, PackedLoader, PackedSample, TokenSource
from sevenfold.data.manifest import Manifest
from sevenfold.data.mixture import MixtureLoader, MixtureSource
from sevenfold.data.pieces import Span
from sevenfold.data.preparation import prepare
from sevenfold.data.prepare_config import PrepareConfig
from sevenfold.data.progress import PrepareProgress, progress_bar
from sevenfold.data.tokenizer import load_tokenizer, token_byte_lengths

__all__ = [
    "IGNORED_LABEL",
    "LengthSlice",
    "Manifest",
    "MixtureLoader",
    "MixtureSource",
    "PackedLoader",
    "PackedSample",
    "PrepareConfig",
    "PrepareProgress",
    "Span",
    "TokenDataset",
    "TokenSource",
    "austen_paths",
    "load_tokenizer",
    "prepare",
    "progress_bar",
    "token_byte_lengths",
]
