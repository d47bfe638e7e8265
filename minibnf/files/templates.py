"""Chat templates: messages to text in jinja2's sandbox, as transformers does it, with bounds on size and time.

A chat template is a program that comes with a downloaded checkpoint. The sandbox keeps it from the machine; the meter here
keeps it from taking all of the memory, or for ever. What a template makes, compares, writes or loops over is charged, in
characters and items, before it is made where it could be large, against a budget that grows with the messages. Between any
two charges lies only work that is linear in values already paid for, so the time, looked at with each charge, is bounded too.
"""

import copy
import json
import re
import time
from collections.abc import Iterator, Mapping
from functools import wraps
from threading import local

SOURCE = 100_000  # characters a template may have; published ones have at most 20,000
BUDGET, PER_INPUT = (
    4_000_000,
    300,
)  # characters and items a rendering may handle, and how many more a character of input buys
SECONDS = 3  # of the thread's own processor time, so a busy machine takes nothing away

# Filters and methods whose result can be their arguments' product; others' is at most a few times their arguments' sum.
PRODUCTS = "batch center format indent join replace round slice tojson truncate".split()
# Others only count or hand on the items of what they are given.
ITEMS = "attr count d default first items last length list map reject rejectattr select selectattr".split()
WITHOUT = (
    "pprint random striptags sum unique urlize wordwrap xmlattr".split()
)  # slow or random, and of no use in a chat


def compile_template(source, where):
    """A function of the template's variables (messages=..., ...) that returns the text.

    source: the template; where: what errors call it. Raises ValueError, here or on a call, where the template is malformed,
    refuses what it is given (raise_exception), fails, or asks for more than BUDGET, SECONDS or the sandbox allow. A template
    is bounded in all but one thing: compiling its at most SOURCE characters can take a second or two.
    """
    try:
        from jinja2 import TemplateError, TemplateSyntaxError
    except ImportError:
        raise ImportError(
            "chat templates need the package jinja2: pip install 'minibnf[hf]'"
        ) from None
    if len(source) > SOURCE:
        raise ValueError(f"{where} has {len(source)} characters, more than the {SOURCE} allowed")
    jinja = environment()
    try:
        jinja.start("")  # constant expressions are worked out here
        template = jinja.from_string(jinja.metered(source))
    except TemplateSyntaxError as error:
        raise ValueError(f"{where} is malformed, line {error.lineno}: {error}") from error
    except Exception as error:  # such as RecursionError: a thousand parentheses
        raise ValueError(f"{where} cannot be compiled: {type(error).__name__}: {error}") from error

    def render(**given):
        try:
            jinja.start(given)
            return template.render(given)
        except (
            Exception
        ) as error:  # a template can raise anything, from ZeroDivisionError to RecursionError
            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            raise ValueError(f"{where} cannot render these messages: {kind}{error}") from error

    return render


def variables_read(source):
    """The names of the variables that a template reads."""
    from jinja2 import meta

    return meta.find_undeclared_variables(environment().parse(source))


def environment():
    """jinja2's ImmutableSandboxedEnvironment as transformers sets it up, and with the meter."""
    from jinja2 import TemplateError, nodes, pass_context
    from jinja2.exceptions import SecurityError, TemplateRuntimeError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace
    from jinja2.visitor import NodeTransformer

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

        def start(self, given):
            """Set this thread's budget for what is given."""
            self.meter.left, self.meter.end = float("inf"), time.thread_time() + SECONDS
            self.meter.left = BUDGET + PER_INPUT * self.weigh(given)

        def charge(self, amount):
            self.meter.left -= amount
            if self.meter.left < 0:
                raise TemplateRuntimeError("it makes or handles far more text than a chat needs")
            if time.thread_time() > self.meter.end:
                raise TemplateRuntimeError(f"it takes more than {SECONDS} seconds")

        def weigh(self, *values):
            """The characters and items in values, each counted as often as it occurs; no more are counted than are left."""
            total, todo = 0, list(values)
            while todo:
                value = todo.pop()
                if isinstance(value, str | bytes | range):
                    total += 1 + len(value)
                elif isinstance(value, int):  # multiplication takes the square of the length
                    total += 1 + value.bit_length() ** 2 // 4096
                elif isinstance(value, Mapping):
                    total += 2 * len(value)
                    todo += [*value.keys(), *value.values()]
                elif isinstance(
                    value,
                    list | tuple | set | type({}.keys()) | type({}.values()) | type({}.items()),
                ):
                    total += 1 + len(value)
                    todo += value
                elif type(value) is type(iter([])):  # what drawn returns
                    todo.append(list(copy.copy(value)))
                elif type(value) is Namespace:
                    todo.append(attributes(value))
                else:
                    total += 16
                if total > self.meter.left:
                    self.charge(total)
            return total

        def charge_product(self, first, *rest):
            """For what may take or make as much as first times the rest: a number counts with its value, here."""
            first, *rest = (abs(v) if isinstance(v, int) else self.weigh(v) for v in (first, *rest))
            self.charge((1 + first) * (1 + sum(rest)))

        def widths(self, text):
            """The numbers in a format, which pad: '%999999d', '{:999999}'."""
            if isinstance(text, str) and re.search(r"\{[^{}]*\{", text):
                raise TemplateRuntimeError("formats within formats are not supported")
            return map(int, re.findall(r"\d+", text)) if isinstance(text, str) else ()

        def call_binop(self, context, operator, left, right):
            numbers = isinstance(left, int | float) and isinstance(right, int | float)
            if operator == "**" and isinstance(left, int) and isinstance(right, int):
                self.charge((left.bit_length() * max(right, 0)) ** 2 // 4096)
            elif operator in "*%" and not numbers:
                many = right if isinstance(right, tuple) else [right]  # '%*d' % (width, number)
                self.charge_product(left, *many, *(self.widths(left) if operator == "%" else ()))
            else:
                self.charge(self.weigh(left, right))
            result = super().call_binop(context, operator, left, right)
            self.charge(self.weigh(result))
            return result

        def call(self, context, obj, /, *args, **kwargs):
            method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
            owner = getattr(method, "__self__", None)
            if isinstance(owner, str | bytes | int | float):
                args = [drawn(self, arg) for arg in args]
                widths = self.widths(owner) if "format" in method.__name__ else ()
                named = [
                    v for k, v in kwargs.items() if not k.startswith("_")
                ]  # jinja adds _loop_vars
                self.charge_product(owner, *args, *named, *widths)
            result = super().call(context, obj, *args, **kwargs)
            if type(result) is Namespace and any(
                str(k).startswith("_") for k in attributes(result)
            ):
                raise SecurityError("a namespace may have no name that begins with _")
            self.charge(self.weigh(result))
            return result

        def metered(self, source):
            """The parsed template, in which values pass the filter 'spend' before they are written, compared or kept."""
            tree = Meter().visit(self.parse(source))
            tree.set_environment(self)
            return tree

    def attributes(namespace):
        return object.__getattribute__(namespace, "_Namespace__attrs")

    def drawn(jinja, value):
        """An iterator's items, weighed, behind an iterator again: filters and methods draw them all at once."""
        if not isinstance(value, Iterator):
            return value
        items = []
        for item in value:
            jinja.charge(jinja.weigh(item))
            items.append(item)
        return iter(items)

    @pass_context
    def spend(context, value):
        context.environment.charge(context.environment.weigh(value))
        return value

    def paid(node):
        return nodes.Filter(node, "spend", [], [], None, None).set_lineno(node.lineno)

    class Meter(NodeTransformer):
        def visit_items(self, node):
            self.generic_visit(node)
            field = "items" if hasattr(node, "items") else "nodes"
            if getattr(node, "ctx", "load") == "load":
                setattr(node, field, [paid(n) for n in getattr(node, field)])
            return node

        visit_Output = visit_Concat = visit_List = visit_Tuple = visit_items

        def visit_value(self, node):
            self.generic_visit(node)
            node.value = paid(node.value)
            return node

        visit_Pair = visit_value  # of a dict

        def visit_Compare(self, node):
            self.generic_visit(node)
            node.expr = paid(node.expr)
            for operand in node.ops:
                operand.expr = paid(operand.expr)
            return node

        def visit_Getitem(self, node):
            self.generic_visit(node)
            if isinstance(node.arg, nodes.Slice):
                node.node = paid(node.node)
            return node

        def visit_For(self, node):
            node.body.insert(
                0, nodes.Output([nodes.TemplateData("")]).set_lineno(node.lineno)
            )  # each turn pays something
            self.generic_visit(node)
            node.test = node.test and paid(node.test)
            return node

        def visit_NSRef(self, node):
            if node.attr.startswith("_"):
                raise SecurityError("a namespace may have no name that begins with _")
            return node

    class Generation(Extension):  # {% generation %} only points out an assistant's words
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(
        x, ensure_ascii=False, indent=None, separators=None, sort_keys=False
    ):  # jinja's own escapes HTML
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def metered_filter(name, function):
        @wraps(function)
        def filtered(*args, **kwargs):
            own = (
                args[:1] if hasattr(function, "jinja_pass_arg") else ()
            )  # jinja's own, such as its environment
            given = args[len(own) :]
            if name in ITEMS:
                result = function(*args, **kwargs)
                jinja.charge(1 + sum(len(v) for v in (given[0], result) if hasattr(v, "__len__")))
                return result
            given = [drawn(jinja, arg) for arg in given]
            if name in PRODUCTS:
                jinja.charge_product(
                    *given, *kwargs.values(), *(jinja.widths(given[0]) if name == "format" else ())
                )
            else:
                jinja.charge(jinja.weigh(*given, *kwargs.values()))
            result = function(*own, *given, **kwargs)
            jinja.charge(jinja.weigh(result))
            return result

        return filtered

    def metered_test(function):
        @wraps(function)
        def tested(*args, **kwargs):
            jinja.charge(jinja.weigh(*(a for i, a in enumerate(args) if i or isinstance(a, str))))
            return function(*args, **kwargs)

        return tested

    jinja = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    jinja.meter = local()
    jinja.filters["tojson"] = tojson
    jinja.filters = {
        k: metered_filter(k, f) for k, f in jinja.filters.items() if k not in WITHOUT
    } | {"spend": spend}
    jinja.tests = {k: metered_test(f) for k, f in jinja.tests.items()}
    del jinja.globals["lipsum"]
    jinja.globals["raise_exception"] = raise_exception
    return jinja
