"""Which runner, and which verifier, serve a model: by the device that it lies on."""

from collections.abc import Sequence

from torch import Tensor, nn

from sevenfold.config import ConfigError
from sevenfold.engine.device import (
    CudaCapture,
    DeviceRunner,
    DeviceVerifier,
    DraftLimits,
    decode_batch_sizes,
    prefill_sizes,
)
from sevenfold.engine.quantised_weights import QuantisedLinear
from sevenfold.engine.runner import Runner
from sevenfold.engine.speculation.pending import PendingDrafts
from sevenfold.engine.speculation.verifier import Verifier
from sevenfold.engine.storage import Storage
from sevenfold.models import HybridModel
from sevenfold.models.feed_forward import Experts
from sevenfold.ops import Impl
from sevenfold.ops.experts import default_mixture_impl
from sevenfold.ops.lightning.api import default_impl as default_scan_impl
from sevenfold.ops.quantised import default_int8_impl

_WIDEST_HEAD = 256  # of the kernels that read a pool of states or pages


def make_runner(
    model: HybridModel,
    storage: Storage,
    limits: tuple[int, int],
    batch_sizes: Sequence[int] | None,
    *,
    invariant: bool = False,
) -> Runner | DeviceRunner:
    """Return the runner of a model over its storage.

    Args:
        model: on its device.
        storage: beside it.
        limits: tokens of a page, and rows of a decoding step at most.
        batch_sizes: of decoding steps that are recorded on a GPU; None takes decode_batch_sizes of
            the most rows, or none where a graph cannot hold the model's step. Where any are, so are
            prefills of one row.
        invariant: whether bits must not depend on company: every recorded step has the most rows,
            no prefill is recorded, and prompts, cut at fixed places, keep to the kernel over pages.

    Raises:
        ConfigError: batch_sizes are given for a CPU or for a model whose steps a graph cannot hold,
            or do not rise from 1, or are more than the one size that is asked for.
    """
    page_tokens, most_rows = limits
    if invariant and batch_sizes is not None and tuple(batch_sizes) != (most_rows,):
        raise ConfigError(
            f"decode_batch_sizes must be ({most_rows},) or None with batch_invariant, got "
            f"{list(batch_sizes)}"
        )
    if model.device.type != "cuda":
        if batch_sizes is not None:
            raise ConfigError(
                f"decode_batch_sizes must be None on {model.device}, which records no graphs, got "
                f"{list(batch_sizes)}"
            )
        return Runner(model, storage, page_tokens=page_tokens)
    can_record = is_recordable(model)
    if batch_sizes and not can_record:
        raise ConfigError(
            "decode_batch_sizes must be empty where a step waits for the host, as with experts in "
            f"another dtype than bf16, heads above {_WIDEST_HEAD}, or 8-bit weights in fp32, got "
            f"{list(batch_sizes)}"
        )
    if batch_sizes is None:
        recorded = (most_rows,) if invariant else decode_batch_sizes(most_rows)
        batch_sizes = recorded if can_record else ()
    capture = CudaCapture(model.device) if batch_sizes else None
    is_padded = capture is not None and not invariant and storage.is_exact
    can_record_prefill = is_padded and scans_wait_for_nothing(model)
    return DeviceRunner(
        model,
        storage,
        page_tokens=page_tokens,
        batch_sizes=batch_sizes,
        prefill_sizes=prefill_sizes(model.config) if can_record_prefill else (),
        capture=capture,
        cuts_change_bits=not invariant,
    )


def make_verifier(
    runner: Runner | DeviceRunner, pending: PendingDrafts, drafts: tuple[int, bool]
) -> Verifier:
    """Return what checks drafts beside a runner, by graphs of the same numbers of rows.

    Args:
        runner: of the model.
        pending: what its states lack.
        drafts: tokens of a draft with its root at most, and whether drafts are trees.
    """
    parts = (runner.model, runner.storage, pending)
    if isinstance(runner, Runner) or not runner.storage.is_exact:
        return Verifier(*parts, page_tokens=runner.page_tokens)
    return DeviceVerifier(
        *parts,
        DraftLimits(*drafts),
        page_tokens=runner.page_tokens,
        batch_sizes=runner.batch_sizes,
        capture=runner.capture,
    )


def is_recordable(model: HybridModel) -> bool:
    """Whether no part of a decoding step on a GPU waits for the host, so that a graph can hold it.

    A mixture of experts counts its rows on the host where it has no kernel.
    """
    x = model.embed_tokens.weight[:1]
    chosen = {impl for module in model.modules() if (impl := _product_impl(x, module))}
    return model.config.head_dim <= _WIDEST_HEAD and chosen <= {Impl.TRITON}


def scans_wait_for_nothing(model: HybridModel) -> bool:
    """Whether lightning attention over a prompt, if there is any, is left to kernels."""
    if not model.config.count("linear_attention"):
        return True
    D = model.config.head_dim
    return default_scan_impl(model.device, model.dtype, D, D) is Impl.TRITON


def _product_impl(x: Tensor, module: nn.Module) -> Impl | None:
    """What a module of a kind that a graph may not hold takes; None of any other."""
    match module:
        case QuantisedLinear():
            return default_int8_impl(x)
        case Experts():
            return default_mixture_impl(x, module.gate_up_proj)
        case _:
            return None
