"""Items that a step makes ready: beside decode rows, and where the step is interrupted."""

import pytest
from engine_helpers import tiny_model, uncached
from test_engine import build, prompts, run, submit, tokens
from test_host_tier import engine_of, is_on_device, plan_of
from tokenizers import Tokenizer


@pytest.mark.parametrize("mix", ["ff", "lsf"])
def test_a_row_that_gets_a_page_beside_one_prompt_keeps_what_it_writes(
    mix: str, tokenizer: Tokenizer
) -> None:
    model = tiny_model(mix, max_position_embeddings=200)
    [text], sides = prompts(0, [13]), prompts(1, [20] * 40)
    engine = build(model, tokenizer, headroom_tokens=0)
    submit(engine, "row", text, 40)
    found: list[int] = []
    while engine.has_work:
        if sides and len(found) < 38:
            submit(engine, f"side {len(sides)}", sides.pop(), 1)
        found += tokens([event for event in engine.step() if event.request_id == "row"])
    assert found == uncached(model, text, 40)


@pytest.mark.parametrize("where", ["placement", "pages"])
@pytest.mark.parametrize(("mix", "slabs"), [("ll", 4), ("lsf", 13), ("lllf", 13)])
def test_a_prefix_from_the_host_survives_an_interrupt_between_plan_and_launch(
    mix: str, slabs: int, where: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(mix, max_position_embeddings=200)
    engine = engine_of(model, tokenizer, plan_of(model, slabs, 60))
    first, *others = prompts(2, [85] + [90] * 60)
    submit(engine, "first", first, 8, marks=(85,))
    second = [*first, *tokens(run(engine)["first"]), 7, 8, 9]
    while is_on_device(engine, second):
        submit(engine, f"other {len(others)}", others.pop(), 8)
        run(engine)
    submit(engine, "second", second, 8)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.cache, where, stop)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    engine.abandon("a step was interrupted")
    run(engine)
    submit(engine, "again", second, 8)
    assert tokens(run(engine)["again"]) == uncached(model, second, 8)
