"""The three stages that take a model from short rows to the longest, as run files.

Source: arXiv 2501.08313 (MiniMax-01) section 4.3 and Table 6. There a model of rows of 8,192 tokens
and a rotary base of 10,000 goes on for 300, 32 and 26 billion tokens in rows of 128K, 512K and 1M.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sevenfold.config import ConfigError, parse_config
from sevenfold.optim import lr_multiplier
from sevenfold.train.config import RunConfig
from sevenfold.train.data_config import SourceSection
from sevenfold.train.toml import to_toml

LONGEST_TOKENS = 2**20
STAGE_TOKENS = 358_000_000_000
_SHORTEST_TOKENS = 1024

# Classes of documents by length, in parts of the longest row: below 32K, below 128K, the rest.
_CLASSES = {"short": (0, 1 / 32), "medium": (1 / 32, 1 / 8), "long": (1 / 8, None)}
_QUESTIONS, _QUESTIONS_WEIGHT, _QUESTIONS_BEGIN = "questions", 0.1, 0.8
# By when weights have moved from the last stage's to this one's; the source gives no number.
_TRANSITION_SHARE = 0.1


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        name: of its run file.
        row_share: its row, in parts of the longest.
        token_share: its tokens, in parts of all stages'.
        theta_factor: multiplies the rotary base of the run that the stages follow.
        weights: of short, medium and long documents.
    """

    name: str
    row_share: float
    token_share: float
    theta_factor: float
    weights: dict[str, float]


STAGES = (
    Stage("1-eighth", 1 / 8, 300 / 358, 500, {"short": 0.30, "medium": 0.70, "long": 0.0}),
    Stage("2-half", 1 / 2, 32 / 358, 1000, {"short": 0.35, "medium": 0.35, "long": 0.30}),
    Stage("3-whole", 1.0, 26 / 358, 1000, {"short": 0.30, "medium": 0.30, "long": 0.40}),
)


def long_context_stages(
    base: RunConfig,
    *,
    longest_tokens: int = LONGEST_TOKENS,
    stage_tokens: int = STAGE_TOKENS,
    questions: Path | None = None,
) -> dict[str, RunConfig]:
    """Return the three runs that follow a run, scaled to any model and length.

    Rows grow from an eighth of the longest over a half to the whole, each stage begins with the
    weights, moments and data of the one before, and weights of the sources move linearly from the
    last stage's to its own. The rotary base is 500 and then 1,000 times the base run's. The rate
    is the base run's last. A step reads as many tokens as the base run's, but at least a row of
    each data rank for every pipeline rank; validation too, but at least a row of each data rank.

    Args:
        base: the run that the stages follow; its sources are parted by length.
        longest_tokens: of a row of the last stage, a multiple of 8 that is 8,192 or more.
        stage_tokens: of all three stages.
        questions: dataset of long texts with questions and answers, a tenth of the last fifth of
            each stage, those that a row holds; None goes without.

    Returns:
        The stages by name, in order.

    Raises:
        ConfigError: a length or number of tokens is too small.
    """
    if longest_tokens % 8 or longest_tokens < 8 * _SHORTEST_TOKENS:
        raise ConfigError(
            f"longest must be a multiple of 8 of {8 * _SHORTEST_TOKENS} tokens or more, got "
            f"{longest_tokens}"
        )
    found: dict[str, RunConfig] = {}
    before, weights = base, STAGES[0].weights
    for stage in STAGES:
        tables = _tables(base, before, stage, longest_tokens, stage_tokens)
        sources = _sources(base, weights, stage, longest_tokens)
        if questions is not None:
            sources.append(_questions(questions, tables["data"]["seq_len"]))
        tables["data"]["sources"] = sources
        before, weights = parse_config(RunConfig, tables, f"stage {stage.name}"), stage.weights
        found[stage.name] = before
    return found


def write_stages(stages: dict[str, RunConfig], folder: Path) -> list[Path]:
    """Write run files; returns their paths, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, config in stages.items():
        paths.append(folder / f"{name}.toml")
        paths[-1].write_text(to_toml(config.model_dump(mode="json")), encoding="utf-8")
    return paths


def _tables(
    base: RunConfig, before: RunConfig, stage: Stage, longest_tokens: int, stage_tokens: int
) -> dict[str, Any]:
    tables = base.model_dump(mode="json")
    seq_len = int(longest_tokens * stage.row_share)
    rows = _step_rows(base, seq_len)
    steps = round(stage_tokens * stage.token_share / (rows * seq_len))
    if steps < 1:
        raise ConfigError(
            f"stage tokens must make a step of {rows * seq_len} tokens in stage {stage.name}, got "
            f"{stage_tokens} in all"
        )
    run, theta = tables["run"], base.model.rope_theta * stage.theta_factor
    tables["run"] = run | {
        "out": f"{base.run.out}-{stage.name}",
        "start_from": str(before.run.out),
        "steps": steps,
        "checkpoint_every_steps": min(base.run.checkpoint_every_steps, max(1, steps // 4)),
    }
    reach = max(base.model.max_position_embeddings, seq_len)
    tables["model"] |= {"rope_theta": theta, "max_position_embeddings": reach}
    last_lr = lr_multiplier(base.schedule, base.run.steps - 1, base.run.steps)
    tables["optimizer"] |= {"lr": base.optimizer.lr * last_lr}
    tables["schedule"] = {"kind": "constant"}
    tables["batch"] = {"tokens_per_step": rows * seq_len, "micro_batch_rows": base.parallel.data}
    tables["checkpointing"] = {"every_layers": 1}
    if base.validation is not None:
        held_out = base.validation.num_samples * base.data.seq_len // seq_len
        held_out = max(base.parallel.data, held_out - held_out % base.parallel.data)
        tables["validation"] |= {"num_samples": held_out}
    tables["data"] = {
        "seq_len": seq_len,
        "mixture_tokens": steps * rows * seq_len,
        "transition_share": _TRANSITION_SHARE,
    }
    return tables


def _step_rows(base: RunConfig, seq_len: int) -> int:
    """Of about the run's tokens, in micro-batches of a row for each data rank; enough of these.

    A pipeline takes as many micro-batches as it has ranks or more, and a multiple of that where its
    ranks have several stages.
    """
    parallel = base.parallel
    count = -(-base.batch.tokens_per_step // (seq_len * parallel.data))
    count = max(parallel.pipeline, count)
    if parallel.pipeline_stages > 1:
        count += -count % parallel.pipeline
    return count * parallel.data


def _sources(
    base: RunConfig, weights: dict[str, float], stage: Stage, longest_tokens: int
) -> list[dict[str, Any]]:
    """Every source of the base run by class of length, those without weight left out."""
    found = []
    for source in base.data.all_sources():
        for kind, (low, high) in _CLASSES.items():
            if weights[kind] == stage.weights[kind] == 0.0:
                continue
            found.append(
                {
                    "name": f"{source.name}-{kind}",
                    "path": str(source.path),
                    "weight": round(weights[kind] * _weight(source), 6),
                    "end_weight": round(stage.weights[kind] * _weight(source), 6),
                    "min_tokens": max(1, int(low * longest_tokens)),
                    "max_tokens": None if high is None else int(high * longest_tokens),
                    "max_epochs": source.max_epochs,
                }
            )
    return found


def _weight(source: SourceSection) -> float:
    return source.weight if source.end_weight is None else source.end_weight


def _questions(path: Path, seq_len: int) -> dict[str, Any]:
    return {
        "name": _QUESTIONS,
        "path": str(path),
        "weight": _QUESTIONS_WEIGHT,
        "begin_share": _QUESTIONS_BEGIN,
        # A longer text's questions would come in another row than what they ask about.
        "max_tokens": seq_len + 1,
    }
