"""Chat templates: hostile ones, what messages cannot become, and where a response begins."""

import json
import random
import signal
import sys
import threading
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minibnf.files.tokenizer import load_tokenizer
from tests.test_stream import byte_fallback
from tests.test_tokenizer import (
    CHATML,
    PROPERTY,
    ROLES,
    SPECIAL,
    WRITERS,
    byte_level,
    controls,
    sentence_piece,
    write_config,
)

pytest.importorskip("tokenizers", reason="needs minibnf[hf]")
pytest.importorskip("jinja2", reason="needs minibnf[hf]")

from minibnf.files.templates import SOURCE, Template

REFUSED = "would make more than a chat needs"
SQUARES = (
    "{% set ns = namespace(i=7) %}{% for i in range(100) %}{% set ns.i = ns.i * ns.i %}{% endfor %}"
)
HOSTILE = {
    "a loop without end": ("{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4, "0.2 seconds"),
    "a filter that does not end": (
        "{{ range(99999)|map('string')|list|length }}" * 2000, "0.2 seconds"
    ),
    "a constant that takes long to work out": (
        "{{ 'a'|center(9999999)|length }}" * 3000, "cannot be compiled.* 0.2 seconds"
    ),
    "a range": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "a text without end": (
        "{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}", "more than 10000000 characters"
    ),
    "a text times": ("{{ 'a' * 10**9 }}", REFUSED),
    "a number times a text": ("{{ 1000000000 * 'a' }}", REFUSED),
    "a list times": ("{{ ([1] * 10**9)|length }}", REFUSED),
    "a power": ("{{ 10**(10**10) }}", REFUSED),
    "squares": (SQUARES, f"{REFUSED}|0.2 seconds"),
    "%": ("{{ '%1000000000d' % 1 }}", REFUSED),
    "% of a key": ("{{ '%(a(b))1000000000d' % {'a(b)': 1} }}", REFUSED),
    "% of bytes": ("{{ 'b%1000000000d'.encode() % 1 }}", REFUSED),
    "% *": ("{{ '%*d' % (1000000000, 1) }}", REFUSED),
    "a macro without end": ("{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}", "RecursionError"),
    "division by zero": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "digits": ("{{ " + "9" * 90000 + " }}", "cannot be compiled: ValueError"),
    "a sum": ("{{ 1" + "+1" * 40000 + " }}", "cannot be compiled"),
    "its length": ("a" * (SOURCE + 1), f"more than {SOURCE} allowed"),
    "a file": ("{% include 'x' %}", "cannot render"),
    "a class": ("{{ messages.__class__.__mro__ }}", "unsafe"),
    "a class through a filter": ("{{ (messages|attr('__class__')).mro() }}", "unsafe|undefined"),
    "another class": ("{% set ns = namespace(__class__=1) %}", "begins with _"),
    "another class, set": ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "begins with _"),
    "another class, of pairs": ("{% set ns = namespace([('__class__', 1)]) %}", "begins with _"),
    "a list that changes": ("{{ messages.append(1) }}", "unsafe"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_an_error(name, monkeypatch):
    template, message = HOSTILE[name]
    if "seconds" in message:
        monkeypatch.setattr("minibnf.files.templates.SECONDS", 0.2)
    with pytest.raises(ValueError, match=f"the template of x.*({message})"):
        Template(template, "the template of x")(messages=[{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ '-' * 30 ~ 3 * 'ab' ~ [1] * 2 }}", "-" * 30 + "ababab[1, 1]"),
        ("{{ 2 ** 10 + 2 ** 0.5 * 0 + 7 % 4 }} {{ 2 * 1.5 }}", "1027.0 3.0"),
        ("{{ '%5.1f|%*d|%s' % (1.25, 4, 7, 'a') ~ '%d' % 123456789 }}", "  1.2|   7|a123456789"),
        ("{% set ns = namespace(self=1) %}{% set ns.x = 2 %}{{ ns.self + ns.x }}", "3"),
    ],
)
def test_what_honest_templates_work_out(template, text):
    assert Template(template, "t")() == text


alarms = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no alarms on this system")


@alarms
def test_alarms_are_left_as_they_were():
    assert Template("{{ x }}", "t")(x=1) == "1"
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    before = signal.signal(signal.SIGALRM, ring := lambda *_: None)
    try:
        signal.setitimer(signal.ITIMER_REAL, 100)
        assert Template("{{ x }}", "t")(x=1) == "1"
        assert signal.getsignal(signal.SIGALRM) is ring
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 90
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_templates_render_in_other_threads_too():
    """There without a time limit, but with bounds on what operators make."""
    render, found = Template("{{ ('a' * n)|length }}", "t"), []

    def work():
        found.append(render(n=100))
        try:
            render(n=10**9)
        except ValueError as error:
            found.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0] == "100" and REFUSED in found[1]


def test_jinja2_may_be_absent_where_no_template_is_rendered(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(byte_level(tmp_path))
    monkeypatch.delitem(sys.modules, "minibnf.files.templates")
    monkeypatch.delattr("minibnf.files.templates")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert tokenizer.encode_text_response("a")[-1] == tokenizer.eos_id
    with pytest.raises(ImportError, match=r"pip install 'minibnf\[hf\]'"):
        tokenizer.render([{"role": "user", "content": "a"}])


# Where messages might become control tokens: texts of these and parts of them, and what may stand
# beside them.
PIECES = [
    *SPECIAL, *ROLES, "<think>", "</think>", "<s>", "</s>", "<pad>", "<unk>", "[INST]", "[/INST]",
    "<", "<|", "<|im_", "im_end", "_end|>", "|>", ">", "start_", "/think>", "[IN", "ST]",
    "<0x0A>", "<0xE4>", "▁", "▁<|im_end|>", " ", "  ", "\n", "\r", "\t", "\u200b", "\u00a0",
    "user", "assistant", "system", "a", "é", "😀", "0;", "{{ eos_token }}",
]  # fmt: skip
HI = [{"role": "user", "content": "Hi"}]
PARIS = [{"role": "assistant", "content": "Paris"}]


def strings(count=5000, more=()):
    draw = random.Random(1)
    return ["".join(draw.choices([*PIECES, *more], k=draw.randint(1, 6))) for _ in range(count)]


def test_what_marks_the_text_may_not_be_in_it(tmp_path):
    with pytest.raises(ValueError, match=r"U\+FDD0, which is no character"):
        load_tokenizer(byte_level(tmp_path)).encode_chat([{"role": "user", "content": "a\ufdd0"}])


# Thoughts stay in the turns after the last question only. Where there is none, an empty one is
# written.
QWEN_3 = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}{{- tool | tojson + '\\n' }}{% endfor %}{{- '<|im_end|>\\n' }}
{%- endif %}
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for m in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and m.role == "user" and m.content is string
           and not (m.content.startswith('<tool_response>')
                    and m.content.endswith('</tool_response>')) %}
        {%- set ns.searching = false %}{% set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set content = m.content if m.content is string else '' %}
    {%- if (m.role == "user") or (m.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif m.role == "assistant" %}
        {%- set thought = '' %}
        {%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n') %}
            {%- set thought = thought.split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + m.role + '\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or (not loop.last and thought)) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}{{- content }}{% endif %}
        {%- for call in m.tool_calls %}
            {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{% endif %}
            {%- set call = call.function if call.function else call %}
            {{- '<tool_call>\\n{"name": "' }}{{- call.name }}{{- '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- m.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
# It writes a system message of its own with the date and the mode, /think or /no_think. The given
# system message may set the mode.
SMOLLM_3 = """
{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}
{%- set mode = "/think" if enable_thinking else "/no_think" -%}
{{- "<|im_start|>system\n" -}}
{%- if messages[0].role == "system" -%}
  {%- set system = messages[0].content -%}
  {%- set mode = "/no_think" if "/no_think" in system
      else "/think" if "/think" in system else mode -%}
  {%- set custom = system.replace("/no_think", "").replace("/think", "").rstrip() -%}
{%- endif -%}
{%- if "/system_override" in system -%}
  {{- custom.replace("/system_override", "").rstrip() -}}{{- "<|im_end|>\n" -}}
{%- else -%}
  {{- "## Metadata\n\nKnowledge Cutoff Date: June 2025\n" -}}
  {{- "Today Date: " ~ strftime_now("%d %B %Y") ~ "\n" -}}
  {{- "Reasoning Mode: " + mode + "\n\n## Custom Instructions\n\n" -}}
  {{- (custom if custom else "Think first." if mode == "/think" else "Be brief.") + "\n\n" -}}
  {%- if xml_tools or python_tools or tools -%}{{- "### Tools\n\n" -}}{%- endif -%}
  {{- "<|im_end|>\n" -}}
{%- endif -%}
{%- for m in messages -%}
  {%- set content = m.content if m.content is string else "" -%}
  {%- if m.role == "user" -%}{{ "<|im_start|>user\n" + content + "<|im_end|>\n" }}
  {%- elif m.role == "assistant" -%}{% generation %}
    {%- set thought = "" if mode == "/think" else "<think>\n\n</think>\n" -%}
    {{- "<|im_start|>assistant\n" + thought + content.lstrip("\n") + "<|im_end|>\n" -}}
  {% endgeneration %}
  {%- elif m.role == "tool" -%}{{ "<|im_start|>user\n" + content + "<|im_end|>\n" }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{ "<|im_start|>assistant\n" + ("" if mode == "/think" else "<think>\n\n</think>\n") }}
{%- endif -%}"""


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    """{(kind, template): Tokenizer}"""
    found = {}
    for kind, write in WRITERS.items():
        base = write(tmp_path_factory.mktemp("t"))
        for template in (QWEN_3, SMOLLM_3):
            found[kind, template] = load_tokenizer(write_config(base, template))
    return found


@pytest.mark.parametrize("template", [QWEN_3, SMOLLM_3], ids=["qwen 3", "smollm 3"])
@pytest.mark.parametrize("kind", WRITERS)
@PROPERTY
@given(
    thought=st.text("ab <|>é", max_size=9),
    answer=st.text("ab <|>/é\n", max_size=9),
    more=st.sampled_from(["", "<think>", "</think> a"]),
)
def test_markup_that_an_assistant_wrote_keeps_its_ids_in_a_completion(
    thinking, kind, template, thought, answer, more
):
    """Sampled, written down as text and read again for training, an answer has the same ids."""
    tokenizer = thinking[kind, template]
    if template == QWEN_3:  # it strips thought and answer, and keeps one thought
        more, answer = "", answer.lstrip("\n")
    said = f"<think>\n{thought}\n</think>\n\n{answer}{more}"
    sampled = [*tokenizer.encode(said, continuation=True), tokenizer.eos_id]
    text = tokenizer.decode(sampled[:-1], skip_special=False)
    prompt, ids = tokenizer.encode_response(HI, [{"role": "assistant", "content": text}])
    assert prompt == tokenizer.encode_chat(HI, True) and ids == sampled
    assert ids[0] == tokenizer.control["<think>"]


@pytest.mark.parametrize("kind", WRITERS)
def test_markup_is_text_in_prompts_and_in_other_roles(kind, tmp_path):
    tokenizer = load_tokenizer(WRITERS[kind](tmp_path))
    think = tokenizer.control["<think>"]
    said = "<think>a</think>"
    for role in ("user", "tool", "system", "assistant"):
        chat = [{"role": role, "content": said}]
        assert think not in tokenizer.encode_chat(chat, True)
        answer = {"role": "assistant", "content": "a"}
        _, ids = tokenizer.encode_response(HI, [answer, *chat, answer])
        assert (think in ids) == (role == "assistant")


@pytest.mark.parametrize("kind", WRITERS)
def test_a_thought_in_a_prompt_has_a_field_of_its_own(kind, tmp_path):
    tokenizer = load_tokenizer(WRITERS[kind](tmp_path, QWEN_3))
    answered = {"role": "assistant", "content": "<think>\na\n</think>\n\nb"}
    with pytest.raises(ValueError, match='"reasoning_content": "'):
        tokenizer.encode_chat([*HI, answered])
    apart = {"role": "assistant", "reasoning_content": "a", "content": "b"}
    ids = tokenizer.encode_chat([*HI, apart])
    assert tokenizer.decode(ids, False).endswith("<think>\na\n</think>\n\nb<|im_end|>\n")
    assert ids.count(tokenizer.control["<think>"]) == 1
    assert tokenizer.encode_response(HI, [apart]) == tokenizer.encode_response(HI, [answered])


@pytest.mark.parametrize("kind", WRITERS)
def test_a_control_token_that_the_template_makes_of_a_message_is_text(kind, tmp_path):
    """SmolLM3's takes /think out of a system message: what is left may be a control token."""
    tokenizer = load_tokenizer(WRITERS[kind](tmp_path, SMOLLM_3))
    for text in ("a < b /think <|im_end|>", "<|im_/thinkend|>\n<|/no_thinkim_end|>"):
        chat = [{"role": "system", "content": text}, *HI]
        ids = tokenizer.encode_chat(chat)
        assert controls(tokenizer, ids) == [tokenizer.bos_id, tokenizer.eos_id] * 2
        assert tokenizer.decode(ids, skip_special=False) == tokenizer.render(chat)


@pytest.mark.parametrize("kind", WRITERS)
def test_variables_reach_the_template_and_forge_nothing(kind, tmp_path):
    tokenizer = load_tokenizer(WRITERS[kind](tmp_path, QWEN_3))
    for name in ("tools", "enable_thinking", "messages", "add_generation_prompt"):
        assert tokenizer.reads(name)
    assert not tokenizer.reads("documents") and not tokenizer.reads("system")
    tools = [{"name": "<|im_end|>", "parameters": {"<think>": ["</think>", 1, None]}}]
    given = {"tools": tools, "enable_thinking": False}
    text = tokenizer.render(HI, True, **given)
    assert '"</think>", 1, null' in text and text.endswith("<think>\n\n</think>\n\n")
    ids = tokenizer.encode_chat(HI, True, **given)
    assert tokenizer.decode(ids, skip_special=False) == text
    turn, thought = [tokenizer.bos_id, tokenizer.eos_id], ["<think>", "</think>"]
    thought = [tokenizer.control[t] for t in thought]
    assert controls(tokenizer, ids) == [*turn, *turn, tokenizer.bos_id, *thought]
    prompt, response = tokenizer.encode_response(HI, PARIS, **given)
    assert prompt == ids and tokenizer.decode(response, False) == "Paris<|im_end|>"


def test_what_a_template_reads_though_it_sets_it_too(tmp_path):
    template = "{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools }}{{ x }}"
    tokenizer = load_tokenizer(byte_level(tmp_path, template + "{% set y = 1 %}{{ y }}"))
    assert tokenizer.reads("tools") and tokenizer.reads("x") and not tokenizer.reads("y")
    assert not load_tokenizer(byte_level(tmp_path, None)).reads("tools")
    with pytest.raises(ValueError, match="malformed"):
        load_tokenizer(byte_level(tmp_path, "{% if %}")).reads("tools")


def test_the_time_is_that_of_loading_until_it_is_set(tmp_path):
    tokenizer = load_tokenizer(byte_level(tmp_path, "{{ strftime_now('%Y-%m-%d') }}"))
    assert tokenizer.render(HI) == tokenizer.now.strftime("%Y-%m-%d")
    tokenizer.now = datetime(2024, 2, 29)
    assert tokenizer.render(HI) == "2024-02-29"


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    ("turn", "closing"),
    [
        ("{{ m.content }}<|im_end|>\n", "<|im_end|>"),
        ("{{ m.content|trim }} ###\n<|endoftext|><|im_end|>", "<|endoftext|>"),
        ("{{ m.content }} ###\n", None),  # text closes a turn
        ("{{ raise_exception('no') }}", None),
        ("{{ m.content|length }}<|im_end|>", None),  # what it says is not there
    ],
)
def test_the_token_that_closes_turns_ends_them(kind, turn, closing, tmp_path):
    template = "{% for m in messages %}<|im_start|>{{ m.role + ':' }}" + turn + "{% endfor %}"
    base = WRITERS[kind](tmp_path, template)
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["eos_token"] = "<|endoftext|>"  # as Qwen's base models have it
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(base)
    found = tokenizer.control.get(closing)
    assert tokenizer.closing_id == found
    assert tokenizer.end_ids == {tokenizer.eos_id, *([] if closing is None else [found])}
    unlisted = closing == "<|im_end|>"
    assert unlisted == ("closes turns with <|im_end|>" in tokenizer.closing_warning)
    assert unlisted == bool(tokenizer.closing_warning)
    if unlisted:
        _, ids = tokenizer.encode_response(HI, PARIS)
        assert tokenizer.decode(ids, skip_special=False).endswith(":Paris<|im_end|>")
        listed = json.dumps({"eos_token_id": [tokenizer.eos_id, found]})
        (base / "generation_config.json").write_text(listed)
        assert load_tokenizer(base).closing_warning == ""


THINKS = (  # an empty thought before the last answer only, as Qwen3 writes it
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + opening }}{% endif %}"
)


@pytest.mark.parametrize("opening", ["", "<think>\n", "<think>\n\n</think>\n\n"])
@pytest.mark.parametrize("kind", WRITERS)
def test_a_thought_that_the_template_writes_is_on_the_side_of_inference(kind, opening, tmp_path):
    template = THINKS.replace("opening", repr(opening))
    tokenizer = load_tokenizer(WRITERS[kind](tmp_path, template))
    prompt, ids = tokenizer.encode_response(HI, PARIS)
    asked = f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{opening}"
    assert prompt == tokenizer.encode(asked)
    rest = "<think>\n\n</think>\n\n".removeprefix(opening)
    assert ids == tokenizer.encode(f"{rest}Paris<|im_end|>", continuation=True)


REWRITING = {
    "a thought that no answer in the history has": (
        CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}"), "'<think>"
    ),
    "a thought in all answers but the last": (
        THINKS.replace("opening", "'<think>\n'").replace(" and loop.last", " and not loop.last"),
        "'<think>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REWRITING)
def test_a_prompt_that_the_history_does_not_begin_with_is_refused(what, tmp_path):
    template, message = REWRITING[what]
    tokenizer = load_tokenizer(byte_level(tmp_path, template))
    with pytest.raises(ValueError, match=f"no boundary exists: .*{message}"):
        tokenizer.encode_response(HI, PARIS)


# What the template does with a turn: its text, an answer, and the response that is trained on.
BOUNDARIES = {
    "writes text after the end of the turn": (
        "{{ m.content }}<|im_end|>{{ ' over' }}", "Paris", "Paris<|im_end|>"
    ),
    "closes it with nothing: the answer's own text is no end": (
        "{{ m.content }}", "<|im_end|>", "<|im_end|>"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BOUNDARIES)
@pytest.mark.parametrize("system", ["", "<|im_start|>Be kind.<|im_end|>\n"])
@pytest.mark.parametrize("kind", WRITERS)
def test_boundaries(kind, system, what, tmp_path):
    turn, answer, rest = BOUNDARIES[what]
    turns = "{% for m in messages %}<|im_start|>{{ m.role + ':' }}" + turn + "{% endfor %}"
    asks = "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    tokenizer = load_tokenizer(WRITERS[kind](tmp_path, system + turns + asks))
    prompt, ids = tokenizer.encode_response(HI, [{"role": "assistant", "content": answer}])
    assert prompt == tokenizer.encode_chat(HI, True)
    text = tokenizer.decode(prompt, False)
    assert text.startswith(system.rstrip("\n")) and text.endswith("assistant:")
    assert tokenizer.decode(ids, False) == rest
    ended = rest != answer and "<|im_end|>" in rest
    assert controls(tokenizer, ids) == ([tokenizer.eos_id] if ended else [])


# A template that shows everything that a chat holds, and whose roles build tokens.
SHOWS = """
{%- for t in tools or [] %}{{ t.name + ':' + t | tojson }}<|im_end|>{% endfor %}
{%- for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ m.name }}
{%- for c in m.calls %}<|im_start|>{{ c.name | trim + c.arguments | tojson }}{% endfor %}
{{- '<|im_end|>\n' }}{% endfor %}{{ note }}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
FORGING = {
    "byte level": byte_level,
    "metaspace": lambda d, t: byte_fallback(d, "metaspace", template=t),
    "gemma": lambda d, t: byte_fallback(d, "gemma", template=t),
    "unigram": lambda d, t: byte_fallback(d, "unigram", template=t),
    "prepend": lambda d, t: changed(byte_fallback(d, "metaspace", template=t), PREPEND),
    "nfkc": lambda d, t: changed(byte_level(d, t), {"normalizer": {"type": "NFKC"}}),
    "sp": sentence_piece,
    "sp nfkc": lambda d, t: sentence_piece(
        d, t, add_dummy_prefix=True, normalization_rule_name="nmt_nfkc"
    ),
}
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREPENDED = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, _SPACES]}
PREPEND = {"normalizer": _PREPENDED, "pre_tokenizer": None}  # as Llama's tokenizer once was
SPELT = [*SPECIAL, *ROLES, "<think>", "</think>", "<s>", "<pad>", "<unk>"]
ADVERSE = st.sampled_from([
    *SPELT, *(t[:k] for t in SPELT for k in (1, 2, -1)),
    *(t[k:] for t in SPELT for k in (1, 2, -1, -2)),
    "im_end", "think", "▁", "<0x0A>", " ", "\n", "\r\n", "a", "é", "😀",
    "＜", "＞", "＜think＞", "＜|im_end|＞", "ﬁ",
])  # fmt: skip
HOSTILE_TEXT = st.lists(ADVERSE | st.text(max_size=2), max_size=5).map("".join)
HOSTILE_TEXT = HOSTILE_TEXT.filter(
    lambda t: not any(c == "\ufdd0" or "\ud800" <= c <= "\udfff" for c in t)
)
ARGUMENTS = st.dictionaries(HOSTILE_TEXT, HOSTILE_TEXT, max_size=2)
CALLS = st.lists(st.fixed_dictionaries({"name": HOSTILE_TEXT, "arguments": ARGUMENTS}), max_size=2)
ROLE = st.sampled_from(["system", "user", "assistant"])
MESSAGES = st.fixed_dictionaries(
    {"role": ROLE, "content": HOSTILE_TEXT, "name": HOSTILE_TEXT, "calls": CALLS}
)


def changed(directory, fields):
    """The directory with other fields in tokenizer.json, whose plain tokens are normalised."""
    spec = json.loads((directory / "tokenizer.json").read_text()) | fields
    for token in spec["added_tokens"]:
        token["normalized"] = not token["special"]
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    return directory


def harmless(value, key=None):
    """The same chat in harmless words."""
    if key == "arguments":
        return {f"k{n}": harmless(v) for n, v in enumerate(value.values())}
    if isinstance(value, dict):
        return {k: harmless(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [harmless(v) for v in value]
    return value if key == "role" else "word"


@pytest.fixture(scope="module")
def forging(tmp_path_factory):
    """{kind: Tokenizer}"""
    folder = tmp_path_factory.mktemp
    return {kind: load_tokenizer(make(folder("t"), SHOWS)) for kind, make in FORGING.items()}


@pytest.mark.parametrize("kind", FORGING)
@PROPERTY
@given(chat=st.lists(MESSAGES, min_size=1, max_size=3), tools=CALLS, note=HOSTILE_TEXT)
def test_whatever_a_chat_says_its_control_tokens_are_those_of_harmless_words(
    forging, kind, chat, tools, note
):
    tokenizer = forging[kind]
    given = {"tools": tools, "note": note}
    try:
        ids = tokenizer.encode_chat(chat, True, **given)
    except ValueError as error:
        assert "nfkc" in kind and "that only resembles it" in str(error)
        return
    plain = tokenizer.encode_chat(harmless(chat), True, **harmless(given))
    assert controls(tokenizer, ids) == controls(tokenizer, plain)
    if kind in ("byte level", "sp", "gemma") and "▁" not in str([chat, given]):
        assert tokenizer.decode(ids, skip_special=False) == tokenizer.render(chat, True, **given)


@pytest.mark.parametrize("kind", ["nfkc", "sp nfkc"])
def test_text_that_a_normalizer_makes_a_control_token_is_refused(forging, kind):
    tokenizer = forging[kind]
    message = {"role": "user", "content": "＜think＞", "name": "", "calls": []}
    with pytest.raises(ValueError, match=r"makes the control token '<think>' of text that only"):
        tokenizer.encode_chat([message])
    ids = tokenizer.encode_chat([message | {"content": "＜a＞（think）"}])
    assert tokenizer.control["<think>"] not in ids
