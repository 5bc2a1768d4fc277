"""Chat messages to prompt text by the model's own jinja2 template, which is code from a stranger.

Knows no model, no device and no token ids. A template runs in jinja2's immutable sandbox, and there under a
meter: every loop turn, call, filter, operator and output counts a step and looks at the clock, and a value
that would be large is refused before it takes memory. There is no thread and no signal in it, since a page
has neither; so no single step may be long. Filters and methods not listed here do not exist for a template.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial, wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.filters import do_round, escape, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, TemplateReference, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter, SecurityError
from jinja2.utils import Cycler, Joiner, Namespace

from realm_web.chat import text as checked
from realm_web.chat.meter import Limits, Meter, refusal, text_bytes
from realm_web.errors import FormatError, RealmError, RequestError
from realm_web.tokenizer import Tokenizer

__all__ = ["CHATML", "ChatTemplate", "Limits"]

# What llama.cpp falls back to where a file has no template.
CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LIMITS = Limits()


class ChatTemplate:
    """One model's way to write a conversation as text.

    >>> source = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    >>> ChatTemplate(source, bos_token="<s>", eos_token="</s>").render([{"role": "user", "content": "Hi"}])
    '[user] Hi</s>'
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str = "",
        eos_token: str = "",
        strip_bos: bool = False,
        limits: Limits = _LIMITS,
    ) -> None:
        """`strip_bos`: leave out a leading `bos_token`, because encoding the text adds it."""
        self.source = source
        self._strip_bos = strip_bos
        self._limits = limits
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        # Compiled at the first use: a broken template is no reason not to load a model.
        self._compiled: tuple[_Sandbox, jinja2.Template] | None = None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], tokenizer: Tokenizer) -> "ChatTemplate":
        """The template of a GGUF file, or ChatML where it has none, as in llama.cpp."""
        source = metadata.get("tokenizer.chat_template") or CHATML
        if not isinstance(source, str):
            raise FormatError(f"tokenizer.chat_template: a string is wanted, not {type(source).__name__}")

        def text(token: int | None) -> str:
            return "" if token is None else tokenizer.token_text(token)

        return cls(
            source,
            bos_token=text(tokenizer.bos_id),
            eos_token=text(tokenizer.eos_id),
            strip_bos=tokenizer.add_bos,
        )

    def compile(self) -> "tuple[_Sandbox, jinja2.Template]":
        """Compiles the template unless it is compiled already; FormatError where that fails."""
        if self._compiled is None:
            try:
                self._compiled = _compile(self.source, self._limits)
            except RealmError:
                raise
            except jinja2.TemplateSyntaxError as error:
                raise FormatError(f"chat template, line {error.lineno}: {_short(error.message)}") from error
            except Exception as error:
                # Python's own compiler has limits too, for which it raises several kinds of error.
                raise FormatError(f"chat template: {type(error).__name__}: {_short(error)}") from error
        return self._compiled

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Prompt text for messages `{"role": ..., "content": ...}`.

        `variables` such as `tools` or `enable_thinking` go to the template. Raises FormatError where the
        template does not compile, RequestError where it refuses the messages, fails, or passes its limits.
        """
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise RequestError(f"messages: {_short(message)} is not an object with a role")
        variables = {
            "tools": None,
            "documents": None,
            **self._tokens,
            **variables,
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        sandbox, template = self.compile()
        try:
            sandbox.meter.begin(variables)
            text = template.render(variables)
        except RealmError:
            raise
        except Exception as error:
            # Whatever else a stranger's code runs into: undefined names, wrong types, refused attributes.
            raise RequestError(f"chat template: {type(error).__name__}: {_short(error)}") from error
        return text.removeprefix(self._tokens["bos_token"]) if self._strip_bos else text


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _compile(source: str, limits: Limits) -> "tuple[_Sandbox, jinja2.Template]":
    if len(source) > limits.source_chars:
        raise FormatError(
            f"chat template: {len(source)} characters, at most {limits.source_chars} are accepted"
        )
    sandbox = _Sandbox(limits)
    # Compiling takes some 20 µs a token, and recursion a level: both are bounded first.
    n_tokens = 0
    for _, kind, _ in sandbox.lex(source):
        n_tokens += kind != "whitespace"
        if n_tokens > limits.source_tokens:
            raise FormatError(f"chat template: more than {limits.source_tokens} tokens")
    too_deep = FormatError(f"chat template: nested deeper than {limits.depth} levels")
    try:
        tree = sandbox.parse(source)
    except RecursionError:
        raise too_deep from None
    level: list[nodes.Node] = [tree]
    for _ in range(limits.depth):
        level = [child for node in level for child in node.iter_child_nodes()]
    if level:
        raise too_deep
    return sandbox, sandbox.from_string(tree)


class _Compiler(CodeGenerator):
    """Writes the meter into the template's code wherever something repeats or a value is made."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        step = nodes.EnvironmentAttribute("meter.step()", lineno=node.lineno)  # is written out as it stands
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(step, node.test, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_Output(self, node: nodes.Output, frame: Frame) -> None:
        self.writeline("environment.meter.step()")
        super().visit_Output(node, frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        self.write("(environment.meter.step() and ")
        super().visit_Compare(node, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._visit_made(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._visit_made(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._visit_made(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._visit_made(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_ScopedEvalContextModifier(self, node: nodes.ScopedEvalContextModifier, frame: Frame) -> None:
        self.fail("autoescape has no meaning in a chat template", node.lineno)

    def _visit_made(self, visit: Callable[..., None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.meter.made(")
        visit(node, frame)
        self.write(")")


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; for a prompt it has no meaning."""

    tags = {"generation"}  # noqa: RUF012 (an attribute that jinja2 asks for)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """Its values change, so no container's weight may depend on them: it prints as one word."""

    def __repr__(self) -> str:
        return "<Namespace>"


_STR_METHODS = """
    capitalize casefold center count endswith find format index isalnum isalpha isascii isdecimal
    isdigit islower isnumeric isspace istitle isupper join ljust lower lstrip partition removeprefix
    removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip
    swapcase title upper zfill
"""
_DICT_METHODS = frozenset({"copy", "get", "items", "keys", "values"})
_ATTRIBUTES: tuple[tuple[tuple[type, ...], frozenset[str]], ...] = (
    ((str,), frozenset(_STR_METHODS.split())),
    ((dict,), _DICT_METHODS),
    ((list, tuple, range), frozenset({"count", "index"})),
)
# Of these, every attribute without a leading underscore.
_TEMPLATE_OBJECTS = (Namespace, LoopContext, Macro, BlockReference, TemplateReference, Cycler, Joiner)

# jinja2's own filters that do no more than their input allows.
_PLAIN_FILTERS = """
    abs attr capitalize count d default dictsort first float int items last length lower map max min reject
    rejectattr reverse select selectattr sort title truncate unique upper
"""
# These make a list of a text's characters or words.
_TAKING_APART = frozenset(
    {"dictsort", "list", "map", "max", "min", "reject", "select", "sort", "title", "unique"}
)
_LONGEST_TAKEN_APART = 100_000


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2 as `transformers` sets it up for chat templates, metered."""

    code_generator_class = _Compiler
    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

    def __init__(self, limits: Limits) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            finalize=_to_text,
            optimized=False,  # nothing is computed while compiling
            cache_size=0,
        )
        self.meter = Meter(limits)
        plain = {name: self.filters[name] for name in _PLAIN_FILTERS.split()}
        own = {
            "e": lambda text: str(escape(text)),
            "escape": lambda text: str(escape(text)),
            "join": self._filter_join,
            "list": lambda values: list(values),
            "round": _round,
            "safe": lambda text: str(text),
            "string": lambda value: str(value),
        }
        sized = {name: partial(function, self.meter) for name, function in checked.FILTERS.items()}
        self.filters = {name: self._metered(name, f) for name, f in (plain | own | sized).items()}
        self.tests = {name: self._metered(name, f) for name, f in self.tests.items()}
        del self.globals["lipsum"]
        self.globals |= {
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def metered(*args: Any, **kwargs: Any) -> Any:
            self.meter.step()
            if name in _TAKING_APART and any(
                isinstance(a, str) and len(a) > _LONGEST_TAKEN_APART for a in args
            ):
                raise refusal(f"uses {name} on a text of more than {_LONGEST_TAKEN_APART} characters")
            value = function(*args, **kwargs)
            if isinstance(value, Iterator):
                value = [item for item in value if self.meter.step()]
            return self.meter.made(value)

        return wraps(function)(metered)  # keeps jinja2's marks

    def _filter_join(self, values: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            values = map(make_attrgetter(self, attribute), values)
        return checked.join(self.meter, str(d), [_to_text_here(self.meter, value) for value in values])

    def concat(self, pieces: Iterable[str]) -> str:
        """Joins the output of the template, a macro or a block."""
        parts = []
        size = 0
        for piece in pieces:
            size += text_bytes(piece) + 8
            self.meter.room(size)
            parts.append(piece)
        return self.meter.made("".join(parts))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str) and __obj.__name__ in checked.METHODS:
            __obj = partial(checked.METHODS[__obj.__name__], __self.meter, owner)
        __self.meter.enter_call()
        value = __self.meter.made(super().call(__context, __obj, *args, **kwargs))
        __self.meter.call_depth -= 1
        return value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.meter.step()
        if operator == "%" and isinstance(left, str):
            return checked.percent(self.meter, left, right)
        self._check_binop(operator, left, right)
        return self.meter.made(super().call_binop(context, operator, left, right))

    def _check_binop(self, operator: str, left: Any, right: Any) -> None:
        """Refuses a result that would be large. What `-`, `/`, `//` and `%` make is not."""
        sequences = (str, list, tuple)
        if operator == "+" and isinstance(left, sequences) and isinstance(right, sequences):
            self.meter.room(self.meter.weigh(left) + self.meter.weigh(right))
        elif operator == "*" and isinstance(left, sequences) and isinstance(right, int):
            self.meter.room((text_bytes(left) if isinstance(left, str) else self.meter.weigh(left)) * right)
        elif operator == "*" and isinstance(right, sequences) and isinstance(left, int):
            self._check_binop(operator, right, left)
        elif operator == "*" and isinstance(left, int) and isinstance(right, int):
            self.meter.bits(left.bit_length() + right.bit_length())
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self.meter.bits(left.bit_length() * right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        # A key may have the name of a method that templates do not have, such as "update".
        if isinstance(obj, dict) and attribute not in _DICT_METHODS and attribute in obj:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for types, names in _ATTRIBUTES:
            if isinstance(obj, types):
                return attr in names
        return isinstance(obj, _TEMPLATE_OBJECTS) and not attr.startswith("_")

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"attribute {_short(attribute)} of {type(obj).__name__} is not for templates")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        owner = getattr(value, "__self__", None)
        if not isinstance(owner, str) or getattr(value, "__name__", "") != "format":
            return None
        return lambda *args, **kwargs: _Formatter(self).vformat(owner, args, kwargs)


class _Formatter(SandboxedFormatter):
    """`str.format` with bounded widths. Fields are accounted for one by one: one value may fill many."""

    def __init__(self, sandbox: _Sandbox) -> None:
        super().__init__(sandbox)
        self._meter = sandbox.meter

    def format_field(self, value: Any, format_spec: str) -> str:
        self._meter.step()
        self._meter.room(checked.largest_width(format_spec))
        return self._meter.made(super().format_field(value, format_spec))


@jinja2.pass_context  # so that jinja2 does not call it while compiling
def _to_text(context: Context, value: Any) -> str:
    """What `{{ value }}` puts out."""
    return _to_text_here(context.environment.meter, value)


def _to_text_here(meter: Meter, value: Any) -> str:
    meter.step()
    return value if isinstance(value, str) else meter.made(str(value))


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    if abs(precision) > 30:
        raise refusal(f"rounds to {_short(precision)} digits")
    return do_round(value, precision, method)


def _raise_exception(message: object) -> None:
    raise RequestError(f"chat template: {_short(message)}")


def _strftime_now(format: str) -> str:
    if len(format) > 100:
        raise refusal("formats the time by more than 100 characters")
    return datetime.now().strftime(format)
