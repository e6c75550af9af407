"""What runs beside which exchange: the recurrence beside states, experts beside token groups."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parallel_helpers import MODEL, MOE
from test_parallel_collectives import alone, flights_told  # noqa: F401
from torch import Tensor
from torch import distributed as dist

from sevenfold.config import parse_config
from sevenfold.models import ModelConfig
from sevenfold.models.feed_forward import MixtureOfExperts
from sevenfold.ops import lightning_attention
from sevenfold.parallel import ParallelConfig, Place, capacity, divide_row, expert_runs, experts
from sevenfold.parallel.context import lightning
from sevenfold.parallel.context.lightning import ContextLightning
from sevenfold.parallel.exchange import Collective
from sevenfold.parallel.expert_runs import ExpertRuns
from sevenfold.parallel.experts import ExpertRoute
from sevenfold.parallel.reading import Reading


class _Tells(torch.autograd.Function):
    """What an operator gave: says when the operator's backward begins."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, events: list[str]) -> Tensor:
        ctx.events = events
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.events.append("work")
        return grads[0], None


def test_states_travel_beside_the_recurrence_both_ways(
    alone: dist.ProcessGroup,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events = flights_told(monkeypatch)

    def told(*arguments: Any, **named: Any) -> Any:
        events.append("work")
        result = lightning_attention(*arguments, **named)
        return result._replace(o=_Tells.apply(result.o, events))

    monkeypatch.setattr(lightning, "lightning_attention", told)
    attend = ContextLightning(SimpleNamespace(log_decay=torch.tensor([-0.1, -0.01])), alone)
    # One rank has both stretches; the state of the first goes to the second.
    batch = divide_row([16], 1, 0, device=torch.device("cpu"))
    assert batch.cut.crosses
    q, k, v = (torch.randn(1, 16, 2, 3).requires_grad_() for _ in range(3))
    o, _ = attend(q, k, v, batch, None)
    assert events == ["start 0", "work", "finish 0"]
    events.clear()
    o.sum().backward()
    assert events == ["start 0", "work", "finish 0"]


def route_of_one(group: dist.ProcessGroup, token_groups: int, drops: bool) -> ExpertRoute:
    """A layer's route whose only rank holds all experts."""
    model = parse_config(ModelConfig, MODEL | {"moe": MOE}, "test")
    layout = SimpleNamespace(
        config=ParallelConfig(expert_token_groups=token_groups),
        place=Place(0, 0, 0, 0),
        group=lambda name: group,
        expert_exchange=Collective(group),
    )
    moe = MixtureOfExperts(model, model.moe).train(drops)
    torch.nn.init.normal_(moe.experts.gate_up_proj)
    torch.nn.init.normal_(moe.experts.down_proj)
    return ExpertRoute(moe, layout)


@pytest.mark.filterwarnings("ignore:`torch.distributed.all_gather_into_tensor:FutureWarning")
@pytest.mark.parametrize("drops", [False, True])
def test_a_token_group_travels_while_the_experts_run_on_another(
    drops: bool,
    alone: dist.ProcessGroup,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events = flights_told(monkeypatch)
    route = route_of_one(alone, 3, drops)
    run = ExpertRuns.__call__

    def told(*arguments: Any) -> Tensor:
        events.append("work")
        return _Tells.apply(run(*arguments), events)

    monkeypatch.setattr(ExpertRuns, "__call__", told)
    tokens = torch.randn(12, 16, requires_grad=True)
    y, _ = route(tokens, torch.full((12, 2), 0.5), torch.arange(24).view(12, 2) % 4)
    # Flights 0, 1 and 3 go to the experts; 2, 4 and 5 bring back what those made of them. Of each
    # group half of what stays is computed before what comes is waited for, the other half after.
    forward = ["start 0", "work", "finish 0", "start 1", "work", "start 2", "work"]
    forward += ["work", "finish 1", "start 3", "work", "start 4", "work"]
    forward += ["work", "finish 3", "work", "start 5", "work", "finish 2", "finish 4", "finish 5"]
    assert events == forward
    events.clear()
    y.sum().backward()
    # The same backward: what was waited for last leaves first.
    turned = {"start": "finish", "finish": "start", "work": "work"}
    backward = [" ".join((turned[e.split()[0]], *e.split()[1:])) for e in reversed(forward)]
    assert events == backward


@pytest.mark.filterwarnings("ignore:`torch.distributed.all_gather_into_tensor:FutureWarning")
def test_rows_leave_as_soon_as_the_counts_have_come(
    alone: dist.ProcessGroup,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then what stays is computed, and all numbers that the device needs go there at once."""
    events = flights_told(monkeypatch)

    def tell(owner: Any, name: str, event: str) -> None:
        method = getattr(owner, name)

        def told(*arguments: Any, **named: Any) -> Any:
            events.append(event)
            return method(*arguments, **named)

        monkeypatch.setattr(owner, name, told)

    route = route_of_one(alone, 1, False)
    tell(Reading, "numbers", "counts")
    tell(experts, "plan_dispatch", "sort")
    tell(experts, "gather_rows", "copy tokens")
    tell(expert_runs, "sent", "numbers")
    tell(capacity, "sent", "numbers of drops")
    tell(ExpertRuns, "__call__", "work")
    route(torch.randn(6, 16), torch.full((6, 2), 0.5), torch.arange(12).view(6, 2) % 4)
    assert events == [
        *("sort", "copy tokens", "counts", "start 0", "work", "numbers", "finish 0"),
        *("work", "start 1", "work", "finish 1"),
    ]
