"""Chat templates: where they come from, what they may do, and for how long."""

import json
import time
from pathlib import Path

import pytest
from server_helpers import HELLO

from sevenfold.config import CheckpointError
from sevenfold.server.chat_template import (
    MAX_TEMPLATE_CHARS,
    ChatTemplate,
    Cut,
    Rendered,
    TemplateSource,
    read_template,
)
from sevenfold.server.errors import ApiError
from sevenfold.server.template_worker import MAX_CUT_CHARS, NUM_CUTS_BEYOND

PARTS = "{% for m in messages %}{{ m['role'] }}={{ m['content'][0]['text'] }};{% endfor %}"
PLAIN = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"


def rendered(text: str, *, timeout_s: float = 20.0, tools: list | None = None) -> str | None:
    template = ChatTemplate(TemplateSource(text), timeout_s)
    try:
        return template.render(HELLO, tools).text
    finally:
        template.close()


def test_the_default_template() -> None:
    template = ChatTemplate(TemplateSource(), 20.0)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "Hum"},
    ]
    made = template.render(messages, None, [Cut(1), Cut(4), Cut(2, 1)])
    assert made.text == "System: Be brief.\nUser: Hi\nAssistant: Ho\nUser: Hum\nAssistant:"
    ends = (
        "System: Be brief.\n",
        made.text.removesuffix("Assistant:"),
        "System: Be brief.\nUser: H",
    )
    assert made.shared == tuple(map(len, ends))
    tools = [{"type": "function", "function": {"name": "look"}}]
    with_tools = template.render(HELLO, tools).text
    assert with_tools.startswith(f"Tools: {json.dumps(tools)}\n")
    assert (template.takes_tools, template.takes_parts) == (True, False)
    template.close()


def test_content_as_text_or_parts_is_what_the_template_reads() -> None:
    for text, parts in ((PARTS, True), (PLAIN, False)):
        template = ChatTemplate(TemplateSource(text), 20.0)
        assert (template.takes_parts, template.takes_tools) == (parts, False)
        template.close()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, TemplateSource()),
        ({"chat_template.jinja": PLAIN}, TemplateSource(PLAIN, {}, ())),
        ({"chat_template.json": {"chat_template": PLAIN}}, TemplateSource(PLAIN, {}, ())),
        (
            {"tokenizer_config.json": {"chat_template": PLAIN, "bos_token": {"content": "<s>"}}},
            TemplateSource(PLAIN, {"bos_token": "<s>"}, ()),
        ),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [
                        {"name": "rag", "template": "x"},
                        {"name": "default", "template": PLAIN},
                    ],
                    "eos_token": "</s>",
                }
            },
            TemplateSource(PLAIN, {"eos_token": "</s>"}, ()),
        ),
        (
            {"tokenizer_config.json": {"chat_template": "x"}, "chat_template.jinja": PLAIN},
            TemplateSource(PLAIN, {}, ()),
        ),
    ],
)
def test_where_templates_come_from(tmp_path: Path, files: dict, expected: TemplateSource) -> None:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text)
    assert read_template(tmp_path) == expected


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer_config.json", "{", "tokenizer_config.json must be JSON"),
        ("tokenizer_config.json", "[]", "must be a JSON object, got a list"),
        ("chat_template.json", '{"chat_template": 7}', "chat_template must be a text"),
        ("chat_template.jinja", "x" * (MAX_TEMPLATE_CHARS + 1), "must be a text of at most"),
    ],
)
def test_broken_template_files(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=said):
        read_template(tmp_path)


def test_a_template_that_is_none() -> None:
    with pytest.raises(CheckpointError, match="chat_template must be a Jinja template"):
        ChatTemplate(TemplateSource("{% for %}"), 20.0)


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ [1] | attr('__class__') | attr('__base__') }}",
    ],
)
def test_what_a_template_may_not_do(text: str) -> None:
    try:
        said = rendered(text)
    except ApiError as error:
        said = error.detail.split(":")[0]
    # An attribute that the sandbox hides is an empty text, anything else an error.
    assert said in ("", "messages must suit the model's chat template")


@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages if m.content == 'hello' %}{% for a in range(99999) %}"
        "{% for b in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
        "{% if messages[0].content == 'hello' %}{{ 'x' * 10**10 }}{% endif %}",
        "{% if messages[0].content == 'hello' %}{% for a in range(99999) %}{{ 'x' * 9999 }}"
        "{% endfor %}{% endif %}",
    ],
)
def test_a_template_that_takes_too_much_is_ended_and_the_next_request_is_served(text: str) -> None:
    template = ChatTemplate(TemplateSource(text), 2.0)
    began = time.monotonic()
    with pytest.raises(ApiError) as raised:
        template.render(HELLO, None)
    assert raised.value.status_code == 400
    assert time.monotonic() - began < 15
    assert template.render([{"role": "user", "content": "no"}], None).text == ""
    template.close()


def test_a_shorter_conversation_that_the_template_refuses_is_no_error() -> None:
    text = "{% if messages|length < 2 %}{{ raise_exception('two') }}{% endif %}ok"
    template = ChatTemplate(TemplateSource(text), 20.0)
    assert template.render(HELLO * 2, None, [Cut(1), Cut(2)]) == Rendered("ok", (None, 2))
    template.close()


def test_shorter_conversations_never_cost_a_request_its_answer() -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    huge = "{{ 'x' * 10**10 }}"
    for bad, num_shared in ((endless, None), (huge, 2)):
        text = (
            "{% if messages|length == 1 and messages[0].content == 'hello' %}"
            + bad
            + "{% endif %}ok"
        )
        template = ChatTemplate(TemplateSource(text), 4.0)
        worker = template._process
        made = template.render(HELLO * 2, None, [Cut(2), Cut(1), Cut(2)])
        # What comes after one that takes all the time is left out.
        assert made == Rendered("ok", (2, None, num_shared))
        assert template.render(HELLO * 2, None, [Cut(2)]).shared == (2,)
        assert template._process is worker
        template.close()


def test_of_a_long_conversation_few_shorter_ones_are_rendered() -> None:
    template = ChatTemplate(TemplateSource(), 60.0)
    cuts = [Cut(num) for num in (100, 1, 99, 98, 96, 92, 84, 68)]
    for num_chars, num_made in ((1000, 8), (MAX_CUT_CHARS // 50, NUM_CUTS_BEYOND)):
        turns = [{"role": "user", "content": "x" * num_chars}] * 100
        made = template.render(turns, None, cuts)
        assert [one is not None for one in made.shared] == [n < num_made for n in range(8)]
    template.close()


def test_the_worker_gets_each_message_once(monkeypatch) -> None:
    jobs = []
    template = ChatTemplate(TemplateSource(), 20.0)
    asked = template._ask
    monkeypatch.setattr(template, "_ask", lambda job, s: jobs.append(job) or asked(job, s))
    turns = [{"role": "user", "content": f"turn {n}"} for n in range(9)]
    template.render(turns, None, [*map(Cut, range(1, 10)), Cut(9, 2)])
    assert json.dumps(jobs).count("turn ") == 9
    template.close()
