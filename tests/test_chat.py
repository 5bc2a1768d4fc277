"""Chat templates: llama.cpp's recorded prompts, jinja2's own meaning, and templates written to do harm."""

import json
import time
import tracemalloc
from pathlib import Path

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm_web.chat import CHATML, ChatTemplate, Limits
from realm_web.errors import FormatError, RealmError, RequestError
from realm_web.gguf import NeedMoreBytes, parse
from realm_web.tokenizer import Tokenizer

MESSAGES = [
    {"role": "system", "content": "Be terse."},
    {"role": "user", "content": "2 + 2?"},
    {
        "role": "assistant",
        "content": "<think>hm</think>4",
        "tool_calls": [{"name": "f", "arguments": {"é": 1}}],
    },
    {"role": "user", "content": "and \n times 3?\n"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "items": [1, 2.5]}}}]


def render(source: str, messages=MESSAGES, **variables) -> str:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(messages, **variables)


def read_metadata(path: Path) -> dict:
    with path.open("rb") as file:
        n = 1 << 20
        while True:
            file.seek(0)
            try:
                return parse(file.read(n)).metadata
            except NeedMoreBytes as more:
                n = more.n


def check_goldens(template: ChatTemplate, path: Path) -> None:
    for case in json.loads(path.read_text(encoding="utf-8"))["chat"]:
        assert template.render(case["messages"]) == case["prompt"]


def test_smollm2s_template_renders_as_in_llama_cpp(smollm2_path: Path, shared: Path) -> None:
    metadata = read_metadata(smollm2_path)
    template = ChatTemplate.from_metadata(metadata, Tokenizer.from_metadata(metadata))
    check_goldens(template, shared / "goldens" / "smollm2-135m-instruct-q4_1.json")


def small_tokenizer(**flags) -> Tokenizer:
    tokens = [chr(c) for c in range(0x21, 0x7F)] + ["<begin>", "<end>"]
    return Tokenizer.from_metadata(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [1] * (len(tokens) - 2) + [3, 3],
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.bos_token_id": len(tokens) - 2,
            "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        }
        | flags
    )


def test_deepseeks_template_renders_as_in_llama_cpp(shared: Path) -> None:
    # the part of its template that the recorded conversations reach
    source = (
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
        "{% set ns = namespace(system_prompt='', is_tool=false) %}"
        "{%- for message in messages %}{%- if message['role'] == 'system' %}"
        "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}"
        "{{bos_token}}{{ns.system_prompt}}"
        "{%- for message in messages %}{%- if message['role'] == 'user' %}"
        "{{'<｜User｜>' + message['content']}}{%- endif %}"
        "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
        "{% set content = message['content'] %}{% if '</think>' in content %}"
        "{% set content = content.split('</think>')[-1] %}{% endif %}"
        "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}"
        "{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜>'}}{% endif %}"
    )
    tokenizer = small_tokenizer(**{"tokenizer.ggml.add_bos_token": True})
    template = ChatTemplate.from_metadata({"tokenizer.chat_template": source}, tokenizer)
    check_goldens(template, shared / "goldens" / "deepseek-r1-qwen-tokenizer.json")


def test_a_file_without_a_template_gets_chatml_as_in_llama_cpp(shared: Path) -> None:
    for metadata in ({}, {"tokenizer.chat_template": ""}):
        template = ChatTemplate.from_metadata(metadata, small_tokenizer())
        assert template.source == CHATML
        check_goldens(template, shared / "goldens" / "gemma3-270m-q4_k_m.json")


def test_a_template_that_is_no_text_is_refused() -> None:
    with pytest.raises(FormatError, match="chat_template"):
        ChatTemplate.from_metadata({"tokenizer.chat_template": ["a"]}, small_tokenizer())


def test_the_leading_bos_is_left_out_only_where_encoding_adds_it() -> None:
    source = {"tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"}
    for adds, wanted in ((True, "Be terse.<end>"), (False, "<begin>Be terse.<end>")):
        tokenizer = small_tokenizer(**{"tokenizer.ggml.add_bos_token": adds})
        template = ChatTemplate.from_metadata(source, tokenizer)
        assert template.render(MESSAGES) == wanted
        once = [tokenizer.bos_id, *tokenizer.encode("Be terse.<end>", add_special=False)]
        assert tokenizer.encode(template.render(MESSAGES)) == once


# Turns of phrase from published templates; each must mean what plain jinja2 makes of it.
PHRASES = r"""
{%- for m in messages -%} {{ loop.index0 ~ m.role }} {{ loop.last }} {{ loop.length }} {%- endfor %}
{% for m in messages if m.role == 'user' %}{{ m['content'] | trim }}|{% else %}none{% endfor %}
{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}
{% for m in messages[::-1] %}{{ m.role }}{% endfor %}{{ messages[1:] | length }}{{ messages[-1].content }}
{% set ns = namespace(n=0, seen=[]) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% set ns.seen = ns.seen + [m.role] %}{% endfor %}{{ ns.n }}{{ ns.seen | join(', ') }}
{% macro show(m, mark='*') %}{{ mark }}{{ m.role }}{{ caller() if caller }}{% endmacro %}{{ show(messages[0]) }}{% call show(messages[1], mark='+') %}!{% endcall %}
{{ messages[2].content.split('</think>')[-1].lstrip('\\n') }}{{ 'a,b,,c'.rsplit(',', 1) }}{{ ' a b '.split() }}
{{ 'x'.join(['a', 'b']) }}{{ 'abc'.replace('b', 'dd') }}{{ 'aaa' | replace('a', 'b', 2) }}{{ 'a' | center(5) }}
{{ '%s-%03d' % ('a', 7) }}{{ '%(x)s' % {'x': 1} }}{{ '{:>4}|{}'.format(1, 'b') }}{{ '%s' | format('x') }}
{{ [3, 1, 2] | sort | list }}{{ [1, 1] | unique | list }}{{ {'b': 1, 'a': 2} | dictsort }}{{ [1, 2] | map('string') | list }}
{{ messages | map(attribute='role') | list }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ messages | rejectattr('tool_calls', 'defined') | map(attribute='role') | join('+') }}{{ messages|join('-', attribute='role') }}
{{ ('a' in 'abc') and 1 < 2 <= 2 and 'x' not in ['y'] and none is none and messages is iterable }}
{{ messages[2].tool_calls is defined }}{{ messages[0].tool_calls is defined }}{{ messages[0].get('x', 'd') }}
{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{% for k in messages[0] %}{{ k }}{% endfor %}{{ messages[0].keys() | list }}
{{ 'a\nb\n\nc' | indent(2) }}|{{ 'a\nb\n\nc\n' | indent(2, true, true) }}|{{ 'a\nb' | indent('> ', first=True) }}|{{ '' | indent }}
{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 10 }}{{ 7 / 2 }}{{ -3 | abs }}{{ 2.567 | round(2) }}{{ '12' | int + 1 }}{{ 'é' * 3 }}{{ [0] * 2 + [1] }}
{% set x %}{{ messages[0].content }}!{% endset %}{{ x | upper }}{% filter upper %}abc{% endfilter %}{{ x | length }}
{{ range(3) | list }}{{ range(1, 9, 3) | last }}{{ (1, 2) | first }}{{ 'abc' | reverse }}{{ 'abc'[1:] }}{{ 'abc'[0] }}
{{ undefined_thing }}{{ undefined_thing | default('d') }}{{ '' | default('e', true) }}{{ none }}{{ true }}{{ 1.50 }}{{ [1, 'a'] }}
{{ 'a<b' | e }}{{ 'a' | safe }}{{ 'aB c' | title }}{{ 'aB' | capitalize }}{{ 'A' | lower }}{{ ('a b c d e' * 99) | truncate(20) }}
{%- if messages[0]['role'] == 'system' -%} {%- set system = messages[0]['content'] -%} {%- else -%} {%- set system = '' -%} {%- endif -%} {{ system }}
{% raw %}{{ x }}{% endraw %}{# comment #}{{ "a" if messages else "b" }}{{ 'yes' if 1 > 2 }}{{ cycler('a', 'b').next() }}{{ dict(a=1) }}
{% for m in messages recursive %}{{ m.role }}{% if m.tool_calls %}{{ loop([{'role': 'inner'}]) }}{% endif %}{% endfor %}
{{ messages[0].content.strip().upper().startswith('BE') }}{{ 'x-y'.partition('-') }}{{ 'abcb'.rfind('b') }}{{ '7'.zfill(3) }}{{ 'a\nb'.splitlines() }}
{{ bos_token + messages[0].content + eos_token }}{{ add_generation_prompt }}{{ tools is none }}{{ documents is none }}
""".strip().splitlines()  # noqa: E501


def plain_jinja(source: str) -> str:
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    variables = {"messages": MESSAGES, "bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    return environment.from_string(source).render(**variables, tools=None, documents=None)


@pytest.mark.parametrize("phrase", PHRASES)
def test_a_harmless_template_means_what_jinja2_makes_of_it(phrase: str) -> None:
    phrase = phrase.replace("\\n", "\n")
    assert render(phrase) == plain_jinja(phrase)


@given(st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "tool"]), "content": st.text()})))
def test_any_content_goes_through_unchanged(messages: list[dict]) -> None:
    wanted = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    assert render(CHATML, messages, add_generation_prompt=False) == wanted


def test_tojson_is_that_of_transformers() -> None:
    value = {"b": "é<'&>", "a": [1, None, True]}
    for arguments, options in (
        ("", {}),
        ("indent=2", {"indent": 2}),
        ("sort_keys=true", {"sort_keys": True}),
        ("separators=(',', ':')", {"separators": (",", ":")}),
    ):
        wanted = json.dumps(value, ensure_ascii=False, **options)
        assert render(f"{{{{ value | tojson({arguments}) }}}}", value=value) == wanted
    assert render("{{ 'é' | tojson(ensure_ascii=true) }}") == '"\\u00e9"'
    assert render("{{ tools | tojson }}", tools=TOOLS) == json.dumps(TOOLS)


def test_the_extras_of_transformers_are_there() -> None:
    assert render("a{% generation %}{{ messages[0].content }}{% endgeneration %}b") == "aBe terse.b"
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")
    assert render("{{ tools | length }}{{ enable_thinking }}", tools=TOOLS, enable_thinking=False) == "1False"
    with pytest.raises(RequestError, match=r"^chat template: roles must alternate$"):
        render("{{ raise_exception('roles must\n alternate') }}")


def test_keys_of_a_message_win_over_methods_that_templates_do_not_have() -> None:
    assert render("{{ messages[0].update }}", [{"role": "user", "update": "x"}]) == "x"


def test_a_template_is_rendered_again_and_again() -> None:
    template = ChatTemplate("{% for i in range(100000) %}{{ messages[0].content[:0] }}{% endfor %}.")
    for _ in range(3):
        assert template.render(MESSAGES) == "."


@pytest.mark.parametrize("messages", [["hi"], [{"content": "x"}], [{"role": 1, "content": "x"}]])
def test_messages_without_a_role_are_refused(messages) -> None:
    with pytest.raises(RequestError, match="role"):
        render(CHATML, messages)


def test_a_broken_template_is_named_with_its_line() -> None:
    with pytest.raises(FormatError, match="line 2"):
        render("ok\n{% if %}")
    with pytest.raises(FormatError, match="pprint"):
        render("{{ 1 | pprint }}")
    with pytest.raises(FormatError, match="line 1"):
        ChatTemplate("{% if %}").compile()
    with pytest.raises(FormatError, match="too many statically nested blocks"):
        render("{% for a in b %}" * 40 + "{% endfor %}" * 40)
    with pytest.raises(FormatError, match="autoescape"):
        render("{% autoescape true %}{% endautoescape %}")


# Templates by the reason for which they are refused.
BIG = "{% set a = 'a' * 2000000 %}"


def loop(body: str, over: str = "range(99999)") -> str:
    return f"{{% for i in {over} %}}{body}{{% endfor %}}"


def grow(start: str, step: str, after: str = "", times: int = 99) -> str:
    """Sets n.x again and again."""
    return (
        f"{{% set n = namespace(x={start}) %}}" + loop(f"{{% set n.x = {step} %}}", f"range({times})") + after
    )


def macro(arguments: str, body: str, call: str) -> str:
    return f"{{% macro m({arguments}) %}}{body}{{% endmacro %}}{{{{ {call} }}}}"


HOSTILE = {
    "makes a value of more than 8 MiB": {
        "long string": "{{ 'a' * 10**9 }}",
        "long string, reversed": "{{ 10**9 * 'a' }}",
        "long string, constant": "{{ 'a' * 1000000000 }}",
        "long list": "{{ [0] * 10**9 }}",
        "long tuple": "{{ (1, 2) * 10**9 }}",
        "doubling macro": macro("n, x", "{% if n %}{{ m(n-1, x ~ x) }}{% endif %}", "m(60, 'aaaa')"),
        "doubling output": macro("x", "{{ x }}{{ x }}", "m(" * 40 + "'aaaa'" + ")" * 40),
        "doubling by +": grow("'aa'", "n.x + n.x"),
        "doubling by ~": grow("'aa'", "n.x ~ n.x"),
        "doubling by replace": grow("'aa'", "n.x.replace('a', 'aa')"),
        "doubling by filter": grow("'aa'", "n.x | replace('a', 'aa')"),
        "doubling by join": grow("'aa'", "n.x.join([n.x, n.x])"),
        "doubling by format": grow("'aa'", "'{0}{0}'.format(n.x)"),
        "doubling by %": grow("'aa'", "'%s%s' % (n.x, n.x)"),
        "doubling by a block": grow("'aa'", "y", times=0)
        + loop("{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}"),
        "doubling a list": grow("[1]", "n.x + n.x"),
        "nested lists": grow("[1]", "[n.x, n.x]", "{{ n.x }}", 80),
        "nested tuples": grow("(1, 2)", "(n.x, n.x)", "{{ {n.x: 1} }}", 80),
        "nested dicts": grow("{}", "{1: n.x, 2: n.x}", "{{ n.x | tojson }}", 80),
        "nested by dict": grow("{}", "dict(a=n.x, b=n.x)", "{{ n.x }}", 80),
        "namespaces in lists": grow("0", "[n, n]", times=1) + "{% set n.x = [n.x, n.x] %}" * 40 + "{{ n.x }}",
        "many kept copies": BIG + grow("[]", "n.x + [a ~ i]"),
        "much output": loop("x" * 2000),
        "much output in a macro": BIG + macro("", loop("{{ a }}"), "m()"),
        "wide %": "{{ '%999999999d' % 1 }}",
        "wide %, many": "{{ ('%9999d' * 5000) % ((1,) * 5000) }}",
        "precise %": "{{ '%.999999999f' % 1 }}",
        "wide format filter": "{{ '%999999999d' | format(1) }}",
        "many % of one value": BIG + "{{ ('%(a)s' * 1000) % {'a': a} }}",
        "wide format": "{{ '{:>999999999}'.format(1) }}",
        "wide format, nested": "{{ '{:>{}}'.format(1, 999999999) }}",
        "precise format": "{{ '{:.999999999f}'.format(1) }}",
        "center": "{{ 'a' | center(10**9) }}",
        "center method": "{{ 'a'.center(10**9) }}",
        "ljust": "{{ 'a'.ljust(10**9) }}",
        "rjust": "{{ 'a'.rjust(10**9, 'x') }}",
        "zfill": "{{ 'a'.zfill(10**9) }}",
        "indent": "{{ 'a\nb' | indent(10**9) }}",
        "indent many": BIG + "{{ a | replace('a', '\n') | indent(1000) }}",
        "replace many": BIG + "{{ a.replace('', a) }}",
        "join many": BIG + "{{ ([a] * 1000) | join }}",
        "join by much": BIG + "{{ range(1000) | join(a) }}",
        "join method": BIG + "{{ a.join(['x'] * 1000) }}",
        "sort": BIG + "{% set b = a[1:] ~ 'a' %}{{ ([a, b] * 50000) | sort | length }}",
    },
    "takes more than 64 MiB of memory": {
        "many copies": BIG + loop("{% set b = a[1:] %}{{ b[:1] }}"),
        "many fields of one value": BIG + "{{ ('{0}' * 10000).format(a) }}",
    },
    "takes (more than 1000000 steps|longer than 1.0 s)": {
        "nested loops": loop(loop("")),
        "nested filtered loops": loop(loop("", "range(99999) if false")),
        "nested loops over text": BIG + loop(loop("", "a"), "a"),
        "loops by lists": loop("{{ range(99999) | list | length }}", "[0] * 99999"),
        "branching macro": macro("n", "{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}", "m(50)"),
        "branching recursive loop": loop("{% if i %}{{ loop([i-1, i-1]) }}{% endif %}", "[60] recursive"),
        "many small outputs": macro("", loop("{% if 1 %}x{% endif %}" * 500), "m()"),
        "many comparisons": BIG + "{% set b = a ~ '' %}" + loop("{% if a == b %}{% endif %}" * 500),
        "many tests": BIG + "{% set b = a ~ '' %}" + loop("{% if a is eq b %}{% endif %}" * 500),
    },
    "a number of more than 256 bits|rounds to": {
        "power tower": "{{ 10**10**10 }}",
        "squaring": grow("10", "n.x * n.x"),
        "hexadecimal number": BIG + "{% set n = a | int(base=16) %}{{ n // 7 }}",
        "rounding up": "{{ 1 | round(10**9, 'ceil') }}",
    },
    "nests (calls|values) deeper": {
        "endless macro": macro("", "{{ m() }}", "m()"),
        "deep list": grow("[]", "[n.x]", "{{ n.x }}", 9999),
        "deep tuple": grow("()", "(n.x,)", "{{ {n.x: 1} }}", 99999),
    },
    "splits a text|searches a long text|on a text of more": {
        "split": BIG + "{{ a.split('a') | length }}",
        "split at spaces": BIG + "{{ a.replace('a', 'a ').split() | length }}",
        "splitlines": BIG + "{{ a.replace('a', '\n').splitlines() | length }}",
        "letters": BIG + "{{ a | list | length }}",
        "title": BIG + "{{ a | replace('a', 'a ') | title | length }}",
        "search from the end": BIG + "{% set b = 'b' ~ a[:1000000] %}{{ a.rfind(b) }}",
        "strip": BIG + "{{ a.strip(a[:1000000]) }}",
        "split from the end": BIG + "{{ a.rsplit('b' ~ a[:1000000]) | length }}",
    },
    "for more than|a width from|indent or a separator|by more than": {
        "wide % by *": "{{ '%*d' % (999999999, 1) }}",
        "tojson indent": "{{ [1] | tojson(indent=10**9) }}",
        "tojson separators": "{{ [1, 2] | tojson(separators=('a' * 10**6, ':')) }}",
        "time format": "{{ strftime_now('%c' * 100000) }}",
    },
    "is not for templates": {
        "format map": "{{ '{a}'.format_map({'a': 1}) }}",
        "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
        "translate": "{{ 'aaaa'.translate({97: 'aaaa'}) }}",
        "encode": "{{ 'a'.encode() }}",
        "to_bytes": "{{ (1).to_bytes(10**9, 'big') }}",
        "fromkeys": "{{ {}.fromkeys(range(99999)) }}",
        "class": "{{ ''.__class__ }}",
        "mro": "{{ ''.__class__.__mro__ }}",
        "class by item": "{{ ''['__class__'] }}",
        "class by filter": "{{ '' | attr('__class__') }}",
        "class by map": "{{ [''] | map(attribute='__class__') | list }}",
        "class by format": "{{ '{0.__class__}'.format(1) }}",
        "globals": "{{ raise_exception.__globals__ }}",
        "init of a macro": "{% macro m() %}{% endmacro %}{{ m.__init__ }}",
        "environment of a macro": "{% macro m() %}{% endmacro %}{{ m._environment }}",
        "context of self": "{{ self._TemplateReference__context }}",
        "namespace inside": "{{ namespace()._Namespace__attrs }}",
        "loop inside": "{% for i in [1] %}{{ loop._iterator }}{% endfor %}",
        "append": "{{ messages.append(1) }}",
        "update": "{{ messages[0].update({}) }}",
    },
    "nested deeper than 100": {
        "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "deep lists": "{{ " + "[" * 120 + "]" * 120 + " }}",
        "deep blocks": "{% if a %}" * 2000 + "{% endif %}" * 2000,
        "deep sum": "{{ 1" + " + 1" * 8000 + " }}",
        "deep negation": "{{ " + "not " * 9000 + "a }}",
        "deep filters": "{{ 1" + " | abs" * 6000 + " }}",
    },
    "at most 262144|more than 20000 tokens": {
        "too long a source": "x" * 300_000,
        "too many tokens": "{{ a }}" * 10_000,
    },
    "No filter named|undefined|no loader|Range too big": {
        "long range": loop("", "range(10**10)"),
        "lorem ipsum": "{{ lipsum(10**6) }}",
        "batch": "{{ [1] | batch(10**9, 0) | list }}",
        "slice": "{{ [1] | slice(10**9) | list }}",
        "include": "{% include 'x' %}",
        "import": "{% import 'x' as x %}",
        "undefined": "{{ nothing.at.all }}",
    },
    "line 1: unexpected": {
        "unclosed": "{% for x in",
        "odd characters": "{{ \x00 }}",
    },
    "unsupported operand|integer division": {
        "type error": "{{ 1 + 'a' }}",
        "division": "{{ 1 // 0 }}",
    },
}


@pytest.mark.parametrize(
    ("reason", "case"), [(reason, case) for reason in HOSTILE for case in HOSTILE[reason]]
)
def test_a_hostile_template_ends_in_one_error_quickly_and_without_memory(reason: str, case: str) -> None:
    seconds = 1.0 if "longer than" in reason else 10.0  # tracing memory slows all, compiling comes before
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(RealmError, match=f"^chat template.*({reason})") as caught:
            ChatTemplate(HOSTILE[reason][case], limits=Limits(seconds=seconds)).render(MESSAGES)
        assert time.process_time() - began < 5
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()
    assert type(caught.value) in (FormatError, RequestError)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_limits_grow_with_what_came_in() -> None:
    book = [{"role": "user", "content": "word " * 4_000_000}]  # 20 MB
    assert len(render(CHATML, book)) > 20_000_000
    assert (
        len(render("{% for m in messages %}{{ (m.content | trim).strip() }}{% endfor %}", book)) == 19_999_999
    )


def test_limits_are_settable() -> None:
    template = ChatTemplate("{% for i in range(100) %}{% endfor %}", limits=Limits(steps=50))
    with pytest.raises(RequestError, match="50 steps"):
        template.render(MESSAGES)
    slow = ChatTemplate("{% for i in range(99999) %}{% endfor %}", limits=Limits(seconds=0.0))
    with pytest.raises(RequestError, match=r"0\.0 s"):
        slow.render(MESSAGES)
