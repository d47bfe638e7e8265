"""Chat templates: messages to text in jinja2's sandbox, set up as transformers does it.

A chat template is a program that comes with a downloaded checkpoint. The sandbox keeps it away from
the machine's files and processes, and there are limits on its size, text and time.

A hostile template can still keep the processor busy until its time is up, and off the main thread
nothing stops it. Until then it can take as much memory as it likes, since methods and filters may
build long texts. One such call, for example 'a'.center(10**10), also runs to its end before the
time limit can act.
"""

import json
import re
import signal
import threading
from contextlib import contextmanager

from jinja2 import TemplateError, TemplateSyntaxError, meta
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

SOURCE = 100_000  # characters of a template; published ones have at most 20,000
LARGEST = 10_000_000  # characters of a rendered text; items or bits of what an operator makes
SECONDS = 5  # for compiling a template, and for each rendering


class Template:
    """A function of its variables (messages=..., ...) that returns the text.

    variables: the names of those that it reads. Raises ValueError, when it is made or called, where
    the source is malformed, refuses what it is given (raise_exception), fails, or asks for more
    than the sandbox, LARGEST or SECONDS allow; where: what errors call it.
    """

    def __init__(self, source, where):
        self.where = where
        if len(source) > SOURCE:
            raise ValueError(f"{where} has {len(source)} characters, more than {SOURCE} allowed")
        with self.failing("cannot be compiled"):  # constant expressions are worked out here
            self.variables = meta.find_undeclared_variables(ENVIRONMENT.parse(source))
            self.template = ENVIRONMENT.from_string(source)

    def __call__(self, /, **given):
        pieces, size = [], 0
        with self.failing("cannot render these messages"):
            for piece in self.template.generate(given):
                pieces.append(piece)
                size += len(piece)
                if size > LARGEST:
                    raise TemplateError(f"they become more than {LARGEST} characters")
        return "".join(pieces)

    @contextmanager
    def failing(self, what):
        """Whatever the block raises becomes a ValueError; it may take SECONDS.

        A template can raise anything, from ZeroDivisionError to RecursionError.
        """
        try:
            with time_limit(SECONDS):
                yield
        except TemplateSyntaxError as error:
            raise ValueError(f"{self.where} is malformed, line {error.lineno}: {error}") from error
        except (Exception, TimeUp) as error:
            what = f"{self.where} {what}: {type(error).__name__}: {error}"
            raise ValueError(what) from error


# ------------------------------------------------------------------------------------ time limit


class TimeUp(BaseException):
    """No Exception, since jinja2 swallows those while it works out constant expressions."""


@contextmanager
def time_limit(seconds):
    """Raise TimeUp in work that takes longer.

    There is no limit off the main thread, on Windows, and while somebody else has set an alarm.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "setitimer") or any(signal.getitimer(signal.ITIMER_REAL)):
        yield
        return

    def stop(*_):
        raise TimeUp(f"it takes more than {seconds} seconds")

    handler = signal.signal(signal.SIGALRM, stop)
    # again every tenth of a second: what is raised within a destructor, or within a callback of
    # the garbage collector, is lost
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, handler)


# --------------------------------------------------------------------------------------- sandbox


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, whose operators refuse results that are far too large for a chat."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def call_binop(self, context, operator, left, right):
        if size_of(operator, left, right) > LARGEST:
            raise SecurityError(f"'{operator}' would make more than a chat needs")
        return super().call_binop(context, operator, left, right)


def size_of(operator, left, right):
    """At most so many bits (of a number), characters or items the operator makes.

    Of '%99d' % 1 and '%*d' % (99, 1) it is the width, 99. What is an error anyway has size 0.
    """
    if operator == "%" and isinstance(left, str | bytes):
        widths = [int(digits) for digits in re.findall("[0-9]+", str(left))]
        if "*" in str(left) and isinstance(right, tuple):
            widths += [abs(width) for width in right if isinstance(width, int)]
        return sum(widths)
    if isinstance(left, int) and isinstance(right, int):
        if operator == "**":
            return left.bit_length() * max(right, 0)
        return left.bit_length() + right.bit_length()
    sequence, times = (right, left) if isinstance(left, int) else (left, right)
    return len(sequence) * times if hasattr(sequence, "__len__") and isinstance(times, int) else 0


class SafeNamespace(Namespace):
    """A namespace without names such as __class__, through which a template could leave jinja2."""

    def __init__(*args, **kwargs):  # without the name self, which may be a key
        Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **kwargs).items():
            args[0][name] = value

    def __setitem__(self, name, value):
        if str(name).startswith("_"):
            raise SecurityError("a namespace may have no name that begins with _")
        super().__setitem__(name, value)


class Generation(Extension):
    """The tag {% generation %}, which only points out an assistant's words."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message):
    raise TemplateError(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """JSON as it is: jinja2's own filter escapes HTML."""
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


ENVIRONMENT = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
ENVIRONMENT.filters["tojson"] = tojson
ENVIRONMENT.globals |= {"raise_exception": raise_exception, "namespace": SafeNamespace}
