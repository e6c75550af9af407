"""What happens once in an engine, done before a request has to wait for it."""

import logging

import torch

from sevenfold.engine.sampling import Output, Sampler, SamplingParams
from sevenfold.engine.scheduler import SchedulerConfig
from sevenfold.engine.worker import Note, Worker

log_progress = logging.getLogger("sevenfold.engine").info
_PARAMS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7, top_k=40, top_p=0.9, seed=0),
)


def warm_up(worker: Worker, limits: SchedulerConfig, note: Note) -> None:
    """Run what requests within the limits will need; on a CPU checks of drafts, if there are any.

    On a GPU: compiles kernels, by several threads, and runs and records steps and prefills of the
    sizes that requests will need. No result changes, nothing is cached, and no memory is taken that
    requests would not take. Libraries make some of their plans for the thread that calls them: it
    should be the one that takes the steps.

    Args:
        worker: the engine's.
        limits: its scheduler's.
        note: told in a line how far it is.

    Raises:
        WarmUpStoppedError: the worker was told to stop.
    """
    longest = worker.model.config.max_position_embeddings
    chunk_tokens = limits.lone_chunk_tokens or limits.max_step_tokens
    if limits.batch_invariant:
        chunk_tokens = limits.min_chunk_tokens
    worker.warm_up(min(limits.max_request_tokens or longest, longest), chunk_tokens, note)
    if not worker.has_first_times:
        return
    vocab_size, device = worker.model.config.vocab_size, worker.model.device
    for params in _PARAMS:
        for num_rows in (1, 2):
            logits = torch.zeros(num_rows, vocab_size, device=device)
            sampler = Sampler([Output(params, (0,), ())] * num_rows, vocab_size, device)
            sampler.choose_checked(logits, logits)
