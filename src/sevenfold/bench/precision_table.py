"""The documentation's tables from the record of `sevenfold bench precision`."""

from collections.abc import Mapping, Sequence
from typing import Any


def model_table(cases: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows about a model's logits as Markdown."""
    lines = [
        "| case | bytes | logits | largest | KL, mean | KL, largest | same top token |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in cases:
        if "kl" in row:
            figures = (row["logit_error"], row["logit_error_max"], row["kl"], row["kl_max"])
            shown = " | ".join(f"{figure:.1e}" if figure else "0" for figure in figures)
            top = f"{100 * row['same_top']:.2f}%"
            lines.append(f"| {row['case']} | {row['bytes']:,} | {shown} | {top} |")
    return "\n".join(lines)


def state_table(cases: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows about outputs at the real slopes as Markdown."""
    lines = ["| case | layer 0 | layer 40 | layer 78 |", "|---|---|---|---|"]
    for row in cases:
        if "layer_0" in row:
            shown = " | ".join(f"{row[f'layer_{layer}']:.1e}" for layer in (0, 40, 78))
            lines.append(f"| {row['case']} | {shown} |")
    return "\n".join(lines)
