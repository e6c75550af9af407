"""A record's rows as lines: ours, the peer, the floor, the target."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sevenfold.bench.training.cases import OURS, PEER

Row = Mapping[str, Any]


def progress_line(row: Row) -> str:
    """Return a row as one line."""
    name = f"{row['side']:>12} | {row['group']:<8} {row['case']:<26}"
    if row["status"] != "ok":
        return f"{name} | {row['status']}: {row['note']}"
    predicted = row["predicted_bytes"]
    told = f" (predicted {predicted / 2**30:.2f})" if predicted else ""
    return (
        f"{name} | {row['tokens_per_s']:,.0f} tokens/s, {row['step_s']:.3f} s a step, "
        f"{row['share_of_matmul']:.1%} of the measured products, "
        f"{row['peak_bytes'] / 2**30:.2f} GiB{told}, loss error {row['loss_error']:.1e}"
    )


def summary(rows: Sequence[Row]) -> list[str]:
    """Return Markdown tables: steps beside the peer, lengths beside the softmax twin."""
    steps = [row for row in rows if row["group"] in ("step", "mfu", "longest")]
    lines = list(_step_table(steps)) if steps else []
    context = [row for row in rows if row["group"] == "context" and row["status"] == "ok"]
    return lines + ([""] if lines and context else []) + list(_context_table(context))


def _step_table(rows: Sequence[Row]) -> Iterator[str]:
    yield "| case | ours, tokens/s | transformers | ratio | floor | target | share | GiB |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for group, case in dict.fromkeys((row["group"], row["case"]) for row in rows):
        of_case = [row for row in rows if (row["group"], row["case"]) == (group, case)]
        found = {row["side"]: row for row in of_case if row["status"] == "ok"}
        ours, peer = found.get(OURS), found.get(PEER)
        cells = [
            _number(ours, "tokens_per_s"),
            _number(peer, "tokens_per_s"),
            f"{ours['tokens_per_s'] / peer['tokens_per_s']:.2f}" if ours and peer else "",
            _number(ours or peer, "floor_tokens_per_s"),
            _target(of_case),
            f"{ours['share_of_matmul']:.1%}" if ours else "",
            f"{ours['peak_bytes'] / 2**30:.1f}" if ours else "",
        ]
        yield f"| {case} | {' | '.join(cells)} |"


def _context_table(rows: Sequence[Row]) -> Iterator[str]:
    if not rows:
        return
    models = list(dict.fromkeys(row["model"] for row in rows))
    best = {m: max(r["tokens_per_s"] for r in rows if r["model"] == m) for m in models}
    yield f"| tokens of a row | {' | '.join(f'{m}, tokens/s | kept' for m in models)} |"
    yield f"| ---: |{' ---: | ---: |' * len(models)}"
    for tokens in sorted({row["tokens"] for row in rows}):
        found = {row["model"]: row for row in rows if row["tokens"] == tokens}
        cells = [
            f"{found[m]['tokens_per_s']:,.0f} | {found[m]['tokens_per_s'] / best[m]:.0%}"
            if m in found
            else " | "
            for m in models
        ]
        yield f"| {tokens:,} | {' | '.join(cells)} |"


def _number(row: Row | None, key: str) -> str:
    return "" if row is None else f"{row[key]:,.0f}"


def _target(rows: Sequence[Row]) -> str:
    for row in rows:
        if row["target_tokens_per_s"]:
            return f"{row['target_tokens_per_s']:,.0f}"
        if row["target_share"]:
            return f"{row['target_share']:.0%} of products"
    return ""
