"""What changes the logits before a token is chosen: penalties, biases, tokens not allowed yet."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sevenfold.engine.sampling.params import SamplingParams
from sevenfold.engine.transfer import send, upload


class Penalties:
    """The penalties and biases of a batch's requests, and what their outputs hold so far.

    z = bias + z              in the output: z - presence - frequency * count
                              in prompt or output: z / repetition if z > 0, else z * repetition
    Memory only for the requests that ask for any of it.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        prompts: Sequence[Sequence[int]],
        outputs: Sequence[Sequence[int]],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        """Count what N requests have so far; prompts and outputs are their token ids.

        Nothing waits for the device.
        """
        chosen = [n for n, p in enumerate(params) if _asks(p)]
        self._any = bool(chosen)
        if not chosen:
            return
        self._rows = upload(chosen, device)
        shape = (len(chosen), vocab_size)
        self._count = torch.zeros(shape, dtype=torch.int32, device=device)
        self._in_prompt = torch.zeros(shape, dtype=torch.bool, device=device)
        self._bias = torch.zeros(shape, device=device)
        for i, n in enumerate(chosen):
            self._in_prompt[i].index_fill_(0, upload(list(set(prompts[n])), device), True)
            output = upload(outputs[n], device)
            self._count[i].index_add_(0, output, torch.ones_like(output, dtype=torch.int32))
            if bias := params[n].logit_bias:
                values = send(list(bias.values()), torch.float32, device)
                self._bias[i].index_copy_(0, upload(list(bias), device), values)

        def column(name: str) -> Tensor:
            values = [[getattr(params[n], name)] for n in chosen]
            return send(values, torch.float32, device)

        self._presence, self._frequency = column("presence_penalty"), column("frequency_penalty")
        self._repetition = column("repetition_penalty")

    def apply(self, logits: Tensor) -> Tensor:
        """Change logits [N, vocab_size]; what comes in stays as it is."""
        if not self._any:
            return logits
        z = logits[self._rows] + self._bias
        in_output = self._count > 0
        repeated = torch.where(z > 0, z / self._repetition, z * self._repetition)
        z = torch.where(in_output | self._in_prompt, repeated, z)
        z = z - self._presence * in_output - self._frequency * self._count
        return logits.index_copy(0, self._rows, z)

    def record(self, tokens: Tensor) -> None:
        """Count each request's new token [N]."""
        if self._any:
            ones = torch.ones_like(self._count[:, :1])
            self._count.scatter_add_(1, tokens[self._rows][:, None], ones)


def _asks(params: SamplingParams) -> bool:
    penalties = (params.presence_penalty, params.frequency_penalty)
    return params.repetition_penalty != 1 or penalties != (0, 0) or bool(params.logit_bias)
