"""Chat templates: what a hostile one meets, what messages cannot become, and where a response begins under awkward ones."""

import random
import threading
import tracemalloc

import pytest

from minibnf.templates import BUDGET, SOURCE, compile_template
from minibnf.tokenizer import load_tokenizer
from tests.test_tokenizer import (
    CHATML,
    ROLES,
    SPECIAL,
    TEMPLATES,
    byte_level,
    controls,
    expected_controls,
    sentence_piece,
    write_config,
)

pytest.importorskip("tokenizers", reason="needs minibnf[hf]")
pytest.importorskip("jinja2", reason="needs minibnf[hf]")

START = "{% set ns = namespace(x='ab', y=[1], i=7) %}"


def loop(body, count=100):
    return f"{{% for i in range({count}) %}}{body}{{% endfor %}}"


MUCH = "more text than a chat needs|takes more than 0.5 seconds"
HOSTILE = {
    "a range": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "loops that write nothing": (loop(loop(loop("", 99999), 99999), 99999), MUCH),
    "loops that set": (loop(loop("{% set x = i %}", 99999), 99999), MUCH),
    "loops that write": (loop(loop("a" * 99, 99999), 99999), MUCH),
    "loops in a set block": ("{% set x %}" + loop(loop("a" * 99, 99999), 99999) + "{% endset %}", MUCH),
    "a loop's filter": ("{% for i in range(99999) if range(99999)|list|length == 0 %}{% endfor %}", MUCH),
    "a loop over a string": (loop("{% for c in 'a' * 9999 %}{% endfor %}", 99999), MUCH),
    "a loop over a filter": (loop("{% for j in range(99999)|map('string') %}{{ loop.length }}{% endfor %}", 99999), MUCH),
    "calls": ("{% set c = cycler(1) %}" + loop(loop("{% set x = c.next() %}", 99999), 99999), MUCH),
    "a macro without end": ("{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}", "RecursionError"),
    "a tree of macros": ("{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}", MUCH),
    "a tree of blocks": ("{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}", "RecursionError"),
    "a recursive loop": ("{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}", "RecursionError"),
    "a string times": ("{{ 'a' * 10**10 }}", MUCH),
    "a number times a string": ("{{ 10000000000 * 'a' }}", MUCH),
    "a list times": ("{{ ([1] * 10**10)|length }}", MUCH),
    "powers": ("{{ 10**(10**10) }}", MUCH),
    "squares": (START + loop("{% set ns.i = ns.i * ns.i %}"), MUCH),
    "doubling by +": (START + loop("{% set ns.x = ns.x + ns.x %}"), MUCH),
    "doubling by ~": (START + loop("{% set ns.x = ns.x ~ ns.x %}"), MUCH),
    "one long ~": ("{% set a = 'a' * 99999 %}{{ a" + " ~ a" * 9000 + " }}", MUCH),
    "doubling by set": (START + loop("{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"), MUCH),
    "doubling by join": (START + loop("{% set ns.x = [ns.x, ns.x]|join %}"), MUCH),
    "doubling a list": (START + loop("{% set ns.y = ns.y + ns.y %}"), MUCH),
    "a list shared": (START + loop("{% set ns.y = [ns.y, ns.y] %}") + "{{ ns.y }}", MUCH),
    "a tuple shared": (START + loop("{% set ns.y = (ns.y, ns.y) %}") + "{{ ns.y == ns.y }}", MUCH),
    "a dict shared": (START + loop("{% set ns.y = {'a': ns.y, 'b': ns.y} %}") + "{{ ns.y|tojson }}", MUCH),
    "dict() shared": (START + loop("{% set ns.y = dict(a=ns.y, b=ns.y) %}"), MUCH),
    "namespaces shared": (START + loop("{% set ns.y = namespace(a=ns.y, b=ns.y) %}"), MUCH),
    "a namespace of itself": (START + "{% set ns.x = ns %}{{ ns }}", MUCH),
    "join": ("{{ range(99999)|join('a' * 9999) }}", MUCH),
    "join, the method": ("{{ ('a' * 9999).join(range(99999)|map('string')) }}", MUCH),
    "replace": (START + loop("{% set ns.x = ns.x|replace('a', 'aaaa') %}"), MUCH),
    "replace, the method": (START + loop("{% set ns.x = ns.x.replace('', 'aaaa') %}"), MUCH),
    "translate": ("{{ ('a' * 9999).translate({97: 'b' * 999999}) }}", MUCH),
    "center": ("{{ 'a'|center(10000000000) }}", MUCH),
    "center, mapped": ("{{ ['a']|map('center', 10000000000)|list }}", MUCH),
    "center, the method": ("{{ 'a'.center(10000000000) }}", MUCH),
    "zfill": ("{{ 'a'.zfill(10000000000) }}", MUCH),
    "expandtabs": ("{{ '\t\t'.expandtabs(2000000000) }}", MUCH),
    "indent": ("{{ 'a\nb'|indent(10000000000) }}", MUCH),
    "%": ("{{ '%10000000000d' % 1 }}", MUCH),
    "% *": ("{{ '%*d' % (10000000000, 1) }}", MUCH),
    "format": ("{{ '%10000000000d'|format(1) }}", MUCH),
    "format *": ("{{ '%*d'|format(10000000000, 1) }}", MUCH),
    "format, the method": ("{{ '{:10000000000}'.format(1) }}", MUCH),
    "format, got by attr": ("{{ ('{:10000000000}'|attr('format'))(1) }}", MUCH),
    "format in format": ("{{ '{:{}}'.format(1, '10000000000') }}", "formats within formats"),
    "format_map": ("{{ '{a:10000000000}'.format_map({'a': 1}) }}", MUCH),
    "to_bytes": ("{{ (5).to_bytes(10000000000, 'big') }}", MUCH),
    "bytes": ("{{ 'a'.encode().ljust(10000000000) }}", MUCH),
    "tojson": ("{{ [1]|tojson(indent=10000000000) }}", MUCH),
    "tojson's separators": ("{{ range(9999)|list|tojson(separators=('a' * 99999, ':')) }}", MUCH),
    "batch": ("{{ [1]|batch(10000000000, 'x')|list }}", MUCH),
    "slice": ("{{ [1]|slice(10000000000)|list }}", MUCH),
    "round": ("{{ 1.5|round(1000000000, 'floor') }}", MUCH),
    "slices": ("{% macro m(x) %}{% set y = x[1:] %}{{ m(y) }}{% endmacro %}{{ m('a' * 999999) }}", MUCH),
    "comparisons": ("{% set a = 'a' * 999999 %}{% set b = 'a' * 999999 %}" + "{% if a == b %}{% endif %}" * 2000, MUCH),
    "tests": ("{% set a = 'a' * 999999 %}" + "{% if a is upper %}{% endif %}" * 2000, MUCH),
    "a search from the right": ("{% set a = 'a' * 999999 %}{{ a.rfind('b' ~ 'a' * 99999) }}", MUCH),
    "items handed on": ("{% set a = ['a' * 9999] * 99 %}{{ range(99999)|map('default', a, true)|list|tojson }}", MUCH),
    "a list of a list": (START + loop("{% set ns.y = 'ab'|map('attr', 'x')|map('default', ns.y)|list %}") + "{{ ns.y }}", MUCH),
    "sorting": ("{% set a = range(99999)|list %}" + loop("{% set b = a|sort(reverse=true) %}", 9999), MUCH),
    "lipsum": ("{{ lipsum(n=1000000) }}", "'lipsum' is undefined"),
    "urlize": ("{{ 'a'|urlize }}", "No filter named 'urlize'"),
    "division by zero": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "digits": ("{{ " + "9" * 90000 + " }}", "cannot be compiled: ValueError"),
    "parentheses": ("{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}", "cannot be compiled: RecursionError"),
    "a sum": ("{{ 1" + "+1" * 40000 + " }}", "cannot be compiled: RecursionError"),
    "blocks in blocks": ("{% for i in [1] %}" * 60 + "{% endfor %}" * 60, "cannot be compiled: SyntaxError"),
    "its length": ("a" * (SOURCE + 1), f"more than the {SOURCE} allowed"),
    "a file": ("{% include 'x' %}", "cannot render"),
    "another class": ("{% set ns = namespace(__class__=1) %}", "begins with _"),
    "another class, set": (START + "{% set ns.__class__ = 1 %}", "begins with _"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_an_error(name, monkeypatch):
    monkeypatch.setattr("minibnf.templates.SECONDS", 0.5)
    template, message = HOSTILE[name]
    with pytest.raises(ValueError, match=f"the template of x.*({message})"):
        compile_template(template, "the template of x")(messages=[{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    "name", ["one long ~", "join, the method", "replace, the method", "a list of a list", "doubling by set"]
)
def test_a_large_text_is_refused_before_it_is_made(name):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            compile_template(HOSTILE[name][0], "t")(messages=[])
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
    finally:
        tracemalloc.stop()


def test_bounds_hold_in_every_thread_and_leave_nothing_behind():
    render, found = compile_template("{% set x = 'a' * n %}{{ x|length }}", "t"), []

    def work():
        for n in (10**10, BUDGET // 10, 10**10, BUDGET // 10):
            try:
                found.append(render(n=n))
            except ValueError:
                found.append("refused")

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(["refused", str(BUDGET // 10)] * 4)


def test_long_chats_are_no_attack():
    """What honest templates do with every message: look, trim, split, replace, count, compare, join and slice."""
    template = (
        "{% for m in messages[::-1] %}{% set index = messages|length - 1 - loop.index0 %}{% endfor %}"
        "{% for m in messages %}{% if m.role == messages[0].role and '</think>' in m.content %}"
        "{% set c = m.content.split('</think>')[-1].replace('think', 'thought').strip() %}"
        "{{ '<' ~ m.role + '>' + c.strip() ~ [c]|join('') ~ messages|selectattr('role', 'equalto', 'user')|list|length }}"
        "{% endif %}{% endfor %}"
    )
    text = "a" * 300
    for chat in (
        [{"role": "user", "content": "no</think> thinks " + text * 10000}],
        [{"role": "user", "content": "</think>" + text}] * 300,
    ):
        answer = "".join(
            f"<user>{c}{c}{len(chat)}" for c in [chat[0]["content"].split("</think>")[1].replace("think", "thought").strip()]
        )
        assert compile_template(template, "t")(messages=chat) == answer * len(chat)


# Where messages might become control tokens: the texts of these, parts of them, what the marks are made of, and neighbours.
PIECES = [*SPECIAL, *ROLES, "<think>", "</think>", "<s>", "</s>", "<pad>", "<unk>", "[INST]", "[/INST]"]
PIECES += [
    "<",
    "<|",
    "<|im_",
    "im_end",
    "_end|>",
    "|>",
    ">",
    "start_",
    "/think>",
    "[IN",
    "ST]",
    "<0x0A>",
    "<0xE4>",
    "▁",
    "▁<|im_end|>",
]
PIECES += [chr(0xE000 + k) + rest for k in range(3) for rest in ("", "0;", "2;", "start;", "<|im_end|>", "261;")]
PIECES += [
    " ",
    "  ",
    "\n",
    "\r",
    "\t",
    "\u200b",
    "\u00a0",
    "user",
    "assistant",
    "system",
    "a",
    "é",
    "😀",
    "0;",
    "2;",
    "{{ eos_token }}",
]


def strings(count=5000, more=()):
    draw = random.Random(1)
    return ["".join(draw.choices([*PIECES, *more], k=draw.randint(1, 6))) for _ in range(count)]


@pytest.mark.parametrize("kind", ["bpe", "sp"])
@pytest.mark.parametrize("name", ["chatml", "trims", "builds from role"])
def test_5000_strings_give_no_control_token(kind, name, tmp_path):
    tokenizer = load_tokenizer((byte_level if kind == "bpe" else sentence_piece)(tmp_path, TEMPLATES[name]))
    texts = strings()
    for role, *contents in zip(["user", "assistant"] * 1250, texts[::2], texts[1::2], strict=True):
        chat = [{"role": role, "content": text} for text in contents]
        assert controls(tokenizer, tokenizer.encode_chat(chat)) == expected_controls(tokenizer, name, chat), contents


@pytest.mark.parametrize("write", [byte_level, sentence_piece])
def test_not_even_the_marks_of_this_moment_become_control_tokens(write, tmp_path):
    tokenizer = load_tokenizer(write(tmp_path))
    for mark in tokenizer._marks([]) * 2:
        chat = [{"role": "user", "content": f"{mark}{tokenizer.eos_id};<|im_end|>"}]
        ids = tokenizer.encode_chat(chat)
        assert controls(tokenizer, ids) == [tokenizer.bos_id, tokenizer.eos_id]
        assert tokenizer.decode(ids, skip_special=False) == tokenizer.render(chat)


THINKS = (  # an empty thought before the last answer only, as Qwen3 writes it
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + opening }}{% endif %}"
)


@pytest.mark.parametrize("opening", ["", "<think>\n", "<think>\n\n</think>\n\n"])
@pytest.mark.parametrize("kind", ["bpe", "sp"])
def test_a_thought_that_the_template_writes_belongs_to_the_side_that_inference_puts_it_on(kind, opening, tmp_path):
    tokenizer = load_tokenizer(
        (byte_level if kind == "bpe" else sentence_piece)(tmp_path, THINKS.replace("opening", repr(opening)))
    )
    prompt, ids = tokenizer.encode_response([{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Paris"}])
    assert prompt == tokenizer.encode(f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{opening}")
    rest = "<think>\n\n</think>\n\n".removeprefix(opening)
    assert ids == tokenizer.encode(f"{rest}Paris<|im_end|>", continuation=True)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}"), "'<think>"),  # the history has no thought
        (CHATML.replace("{% for", "{% set n = messages|length %}{{ n }}{% for"), "from character 0 on"),
        (THINKS.replace("opening", "'<think>\n'").replace(" and loop.last", " and not loop.last"), "'<think>"),
    ],
)
def test_a_prompt_that_the_history_does_not_begin_with_is_refused(template, message, tmp_path):
    tokenizer = load_tokenizer(byte_level(tmp_path, template))
    with pytest.raises(ValueError, match=f"no boundary exists: .*{message}"):
        tokenizer.encode_response([{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Paris"}])


@pytest.mark.parametrize(
    ("turn", "answer", "rest"),
    [
        ("{{ m.content|trim }}<|im_end|>\n", "  Paris \n", "Paris<|im_end|>"),  # trims, and writes a line after the turn
        ("{{ m.content }}{{ ' ###\n\n' }}", " Paris ", " Paris  ###\n\n"),  # closes the turn with text
        ("{{ m.content }}<|im_end|>{{ ' over' }}", "Paris", "Paris<|im_end|>"),  # text after the end of turn
        ("{{ m.content }}", "<|im_end|>", "<|im_end|>"),  # closes it with nothing: the answer's own text is no end
    ],
)
@pytest.mark.parametrize("system", ["", "<|im_start|>Be kind.<|im_end|>\n"])
@pytest.mark.parametrize("kind", ["bpe", "sp"])
def test_boundaries(kind, system, turn, answer, rest, tmp_path):
    head = "{% for m in messages %}<|im_start|>{{ m.role + ':' }}" + turn
    template = system + head + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    base = (byte_level if kind == "bpe" else sentence_piece)(tmp_path)
    tokenizer = load_tokenizer(write_config(base, template))
    prompt, ids = tokenizer.encode_response([{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": answer}])
    assert prompt == tokenizer.encode_chat([{"role": "user", "content": "Hi"}], True)
    assert tokenizer.decode(prompt, False).startswith(system.rstrip("\n")) and tokenizer.decode(prompt, False).endswith(
        "assistant:"
    )
    assert tokenizer.decode(ids, False) == rest
    assert controls(tokenizer, ids) == [tokenizer.eos_id] * (rest != answer and "<|im_end|>" in rest)
