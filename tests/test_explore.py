"""tutorials/explore.html and explore_model.html in a headless Chromium, judged by minibnf.

Skipped where there is no Chromium (Debian: apt-get install chromium). The browser is spoken to
over two pipes, as its --remote-debugging-pipe wants: one JSON object per message, then a zero byte.
"""

import fcntl
import json
import math
import os
import random
import re
import select
import shutil
import subprocess
import threading
import time
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from minibnf.files import load_tokenizer
from minibnf.generate import generate
from minibnf.losses import LOSSES
from minibnf.model import load, save
from minibnf.responses import Responses

PAGE = Path(__file__).parent.parent / "tutorials" / "explore.html"
MODEL = PAGE.with_name("explore_model.html")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium here (Debian: apt-get install chromium)"
)
NAMES = ["bnf", "rbnf", "nll", "unlikelihood", "dpo", "topr", "tnpo", "power"]
HYPER = {
    "dpo": [{"beta": 0.1, "length": 1}, {"beta": 0.03, "length": 50}, {"beta": 5.0, "length": 3}],
    "tnpo": [{"beta": 1.0}, {"beta": 0.1}, {"beta": 4.0}],
    "power": [{"alpha": 1.0}, {"alpha": 0.0}, {"alpha": 2.5}],
}


class Browser:
    """One tab of a headless Chromium."""

    def __init__(self, profile: Path):
        commands, self.commands = os.pipe()
        self.replies, replies = os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands, replies)]
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(
            [CHROMIUM, *flags, "--remote-debugging-pipe"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(3, 4),  # it reads 3 and writes 4
            preexec_fn=lambda: [os.dup2(end, fd) for end, fd in zip(high, (3, 4), strict=True)],
        )
        for end in (commands, replies, *high):
            os.close(end)
        self.unread, self.sent, self.session = b"", 0, None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def __call__(self, method: str, **parameters) -> dict:
        """A command of the DevTools protocol and its result; events in between are dropped."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.unread:
                assert select.select([self.replies], [], [], 60)[0], f"no reply to {method}"
                more = os.read(self.replies, 1 << 16)
                assert more, "Chromium has gone"
                self.unread += more
            reply, _, self.unread = self.unread.partition(b"\0")
            reply = json.loads(reply)
            if reply.get("id") == self.sent:
                assert "error" not in reply, f"{method}: {reply['error']}"
                return reply["result"]

    def run(self, script: str):
        """The value of a JavaScript expression, as JSON carries it; promises are awaited."""
        found = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def open(
        self, where="#free", page=None, width=1280, height=800, motion="reduce", scheme="light"
    ):
        """Load a page, by default explore.html, on a screen of this size and these wishes."""
        features = {"prefers-reduced-motion": motion, "prefers-color-scheme": scheme}
        features = [{"name": name, "value": value} for name, value in features.items()]
        self("Emulation.setEmulatedMedia", features=features)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 800}
        self("Emulation.setDeviceMetricsOverride", **size)
        self("Emulation.setTouchEmulationEnabled", enabled=width < 800)
        # by way of a blank page, since from #1 to #2 alone nothing would be loaded anew
        page = (page or PAGE.as_uri()) + where
        for url, ready in (("about:blank", "true"), (page, "window.minibnf")):
            self("Page.navigate", url=url)
            self.wait(f"location.href === {url!r} && Boolean({ready})")

    def wait(self, condition: str):
        until = time.monotonic() + 20
        while not self.run(condition):
            assert time.monotonic() < until, f"never came true: {condition}"
            time.sleep(0.01)

    def close(self):
        self.session = None
        self("Browser.close")
        self.process.wait(20)
        os.close(self.commands)
        os.close(self.replies)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


# --------------------------------------------------------------------------------- the mathematics


def one_token(name: str, sign: int, logp, logr, hyper: dict) -> tuple[torch.Tensor, dict]:
    """The loss that the page means, of logp (n,): for dpo n equal tokens whose pair stands still.

    For every other loss n = 1: one unpaired response of one token.
    """
    hyper = {key: x for key, x in hyper.items() if key != "length"}
    n, preferred = len(logp), torch.tensor([sign > 0])
    ref = torch.full_like(logp, logr)
    owner, pairs = torch.zeros(n, dtype=torch.int64), torch.empty(0, 2, dtype=torch.int64)
    if name == "dpo":
        logp, ref = torch.cat([logp, ref]), torch.cat([ref, ref])
        owner = torch.cat([owner, owner + 1])
        preferred = torch.tensor([sign > 0, sign < 0])
        pairs = torch.tensor([[0, 1] if sign > 0 else [1, 0]])
    return Responses(logp, ref, owner, preferred, pairs), hyper


def cases():
    chance = random.Random(0)
    edges = [0.0, -1e-12, -1e-9, -1e-4, -0.5, -1.0, -7.0, -40.0, -700.0, -1000.0]
    values = [*edges, *(-math.exp(chance.uniform(-12, 6)) for _ in range(12))]
    for name in NAMES:
        for hyper in HYPER.get(name, [{}]):
            for sign in (1, -1):
                for logr in values:
                    for logp in [*chance.sample(values, 3), logr]:
                        yield name, sign, logp, logr, hyper


@needs_chromium
def test_weights_and_pushes_are_the_librarys(browser):
    browser.open()
    given = list(cases())
    page = browser.run(f"{json.dumps(given)}.map(x => [minibnf.weight(...x), minibnf.push(...x)])")
    for (name, sign, logp, logr, hyper), (w, push) in zip(given, page, strict=True):
        logps = torch.full((hyper.get("length", 1),), logp, dtype=torch.float64)
        batch, own = one_token(name, sign, logps, logr, hyper)
        dlogp = LOSSES[name].gradient(batch, **own)[0].item()
        case = (name, sign, logp, logr, hyper)
        assert -sign * w == pytest.approx(dlogp, rel=1e-11, abs=1e-300), case
        assert push == pytest.approx(abs(dlogp) * -math.expm1(logp), rel=1e-11, abs=1e-300), case


def library_step(z: torch.Tensor, how: dict) -> torch.Tensor:
    """One step of plain gradient descent on the logits z (V,), by autograd through softmax."""
    n = how["hyper"].get("length", 1)
    leaf = z.expand(n, -1).clone().requires_grad_()  # each token of the answer has such logits
    logr = torch.tensor(how["reference"], dtype=torch.float64).log_softmax(-1)[how["y"]].item()
    logps = leaf.log_softmax(-1)[:, how["y"]]
    batch, hyper = one_token(how["loss"], how["sign"], logps, logr, how["hyper"])
    LOSSES[how["loss"]](batch, **hyper).backward()
    return z - how["rate"] * leaf.grad[0]


@needs_chromium
def test_whole_steps_are_gradient_descent(browser):
    browser.open()
    chance = random.Random(1)
    given = []
    for name in NAMES:
        for hyper in HYPER.get(name, [{}]):
            for sign in (1, -1):
                for _ in range(10):
                    z, reference = ([chance.gauss(0, 3) for _ in range(8)] for _ in range(2))
                    how = dict(loss=name, sign=sign, y=chance.randrange(8), hyper=hyper)
                    given.append((z, how | dict(reference=reference, rate=chance.uniform(0.1, 9))))
    page = browser.run(f"{json.dumps(given)}.map(x => minibnf.step(...x))")
    for (z, how), after in zip(given, page, strict=True):
        expected = library_step(torch.tensor(z, dtype=torch.float64), how).tolist()
        assert after == pytest.approx(expected, rel=1e-12, abs=1e-12), how


# -------------------------------------------------------------------------------- the guided steps


def tent_peaks_at_r(p, r):
    """BNF's push over a grid of p, from the library; where it is largest."""
    grid = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    pushes = []
    for x in grid:
        batch, _ = one_token("bnf", -1, x.log()[None], math.log(r), {})
        pushes.append(abs(LOSSES["bnf"].gradient(batch).item()) * (1 - x.item()))
    return abs(grid[max(range(999), key=pushes.__getitem__)].item() - r) < 0.002


def dpo_pushes_harder_far_below(p, r):
    push = []
    for x in (r, r / 20):
        logp = torch.tensor([math.log(x)], dtype=torch.float64)
        batch, hyper = one_token("dpo", -1, logp, math.log(r), {"beta": 0.1})
        push.append(abs(LOSSES["dpo"].gradient(batch, **hyper)[0].item()) * (1 - x))
    return push[1] > push[0]


# The right answers, and what makes each the right one. p (steps + 1, V): π at each step, from the
# library; r: the word's reference.
TRUE = [
    (
        "Lyon, and even Paris loses",
        lambda p, r: (p[-1] > p[0]).nonzero().flatten().tolist() == [2] and p[-1, 2] > 0.96,
    ),
    (
        "It stays near its maximum, 1",
        # a nat per step to the end: Rome's logit falls by η = 0.5, Paris's rises by as much
        lambda p, r: p[-1, 1] < 1e-80 and 0.999 < (p[-2, 1] / p[-1, 1]).log() < 1.001,
    ),
    ("At p = r", tent_peaks_at_r),
    (
        "Still near 0.001",
        lambda p, r: p[0, 0].item() == pytest.approx(0.001) and p[-1, 0] < 0.0015,
    ),
    ("It is larger", dpo_pushes_harder_far_below),
]


@needs_chromium
@pytest.mark.parametrize("k", range(5))
def test_a_guided_step_tells_the_truth(browser, k):
    browser.open(f"#{k + 1}")
    task = browser.run(f"minibnf.GUIDE[{k}]")
    said = "document.getElementById('reveal').textContent"
    shown = "document.getElementById('push').querySelectorAll('path').length"
    assert browser.run(shown) == 0, "the curve is the answer: it must wait for a guess"
    assert browser.run("document.getElementById('step').disabled")
    how = browser.run(
        "(s => ({loss: s.loss, sign: s.sign, y: s.y, reference: s.reference, rate: s.rate,"
        " hyper: s.hyper[s.loss]}))(minibnf.state)"
    )
    z = [torch.tensor(browser.run("minibnf.state.policy"), dtype=torch.float64)]
    for _ in range(task["steps"]):
        z.append(library_step(z[-1], how))
    logps = torch.stack(z).log_softmax(-1)
    r = torch.tensor(how["reference"], dtype=torch.float64).softmax(-1)[how["y"]].item()
    right, holds = TRUE[k]
    assert holds(logps.exp(), r)
    for guess, answer in enumerate(task["answers"]):
        button = f"document.querySelectorAll('#answers button')[{guess}]"
        browser.open(f"#{k + 1}")
        assert browser.run(f"{button}.textContent") == answer
        browser.run(f"{button}.click()")
        assert browser.run(said).startswith("Yes." if answer == right else "No.")
        path = browser.run("minibnf.state.path")
        assert path == pytest.approx(logps[:, how["y"]].tolist(), rel=1e-9)
        assert browser.run(shown) == 2
    for other in browser.run("minibnf.state.earlier"):  # the grey lines, from the same start
        rate = 10 if other["loss"] == "dpo" else 0.5
        x, changed = z[0], how | dict(loss=other["loss"], rate=rate, hyper={})
        for _ in range(task["steps"]):
            x = library_step(x, changed)
        assert other["path"][-1] == pytest.approx(x.log_softmax(-1)[how["y"]].item(), rel=1e-9)


# --------------------------------------------------------------------------------------- the hands


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390, 360])
def test_a_bar_follows_the_pointer_and_the_keys(browser, width):
    browser.open(width=width, height=844)
    before = browser.run("minibnf.state.policy")
    box = browser.run(
        "(track => { track.scrollIntoView({block: 'center'});"
        " const b = track.getBoundingClientRect(); return [b.left, b.top + b.height / 2, b.width]"
        "})(document.querySelectorAll('.track')[2])"
    )
    at = {"x": round(box[0] + 0.5 * box[2]), "y": round(box[1])}
    path = [at | {"x": at["x"] - far} for far in (40, 30, 20, 10, 0)]
    if width < 800:
        browser("Input.dispatchTouchEvent", type="touchStart", touchPoints=path[:1])
        for point in path[1:]:
            browser("Input.dispatchTouchEvent", type="touchMove", touchPoints=[point])
        browser("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    else:
        button = dict(button="left", buttons=1, clickCount=1)
        browser("Input.dispatchMouseEvent", type="mousePressed", **path[0], **button)
        for point in path[1:]:
            browser("Input.dispatchMouseEvent", type="mouseMoved", **point, **button)
        browser("Input.dispatchMouseEvent", type="mouseReleased", **at, **button)
    after = browser.run("minibnf.state.policy")
    assert [x == y for x, y in zip(before, after, strict=True)] == [v != 2 for v in range(8)]
    wanted = (at["x"] - box[0]) / box[2]
    assert browser.run("minibnf.softmax(minibnf.state.policy)[2]") == pytest.approx(wanted)
    browser.run("document.querySelectorAll('.track')[2].focus()")
    for _ in range(3):
        key = dict(key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39)
        browser("Input.dispatchKeyEvent", type="keyDown", **key)
    assert browser.run("minibnf.state.policy[2]") == pytest.approx(after[2] + 0.3)
    p = browser.run("minibnf.softmax(minibnf.state.policy)[2]")
    told = browser.run("document.querySelectorAll('.track')[2].getAttribute('aria-valuenow')")
    assert told == f"{100 * p:.1f}"


OUTSIDE = """[...document.querySelectorAll("svg text")].filter(text => {
    const box = text.getBBox(), {clientWidth, clientHeight} = text.ownerSVGElement;
    return box.x < -1 || box.y < -1 || box.x + box.width > clientWidth + 1
        || box.y + box.height > clientHeight + 1;
}).map(text => text.textContent)"""


@needs_chromium
@pytest.mark.parametrize("width", [1280, 1000, 830, 390, 360])
def test_the_page_fits_the_screen(browser, width):
    for where in ("#1", "#1a", "#2b", "#3b", "#4a", "#5c", "#free"):
        browser.open(where, width=width)
        assert browser.run("document.documentElement.scrollWidth") <= width, where
        assert browser.run("document.querySelector('.track').clientWidth") > 90, where
        heights = browser.run("[...document.querySelectorAll('.word')].map(x => x.offsetHeight)")
        assert max(heights) < 40, where  # one line per word
        if where == "#free":  # p far above r, so that log r is the lowest of its chart
            browser.run("state.y = 7, begin(withProbability(state.policy, 7, 0.9), true), draw()")
        assert browser.run(OUTSIDE) == [], where


@needs_chromium
def test_run_moves_step_by_step_unless_motion_is_unwanted(browser):
    click = "document.getElementById('run').click(), minibnf.state.path.length"
    later = "new Promise(go => setTimeout(() => go(minibnf.state.path.length), 200))"
    browser.open(motion="reduce")
    assert browser.run(click) == 101  # all at once, and then it rests
    assert browser.run(later) == 101
    browser.open(motion="no-preference")
    assert browser.run(click) == 1
    browser.wait("minibnf.state.path.length > 2")
    stopped = browser.run(click)
    assert stopped < 100 and browser.run(later) == stopped


# ------------------------------------------------------------------------------------ the one file


@pytest.mark.parametrize("page", [PAGE, MODEL], ids=["explore", "explore_model"])
def test_it_asks_for_no_other_file(page):
    """No source, sheet, font or script elsewhere; links lead to files of this repository."""
    text, links = page.read_text(encoding="utf-8"), []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attributes):
            attributes = dict(attributes)
            assert "src" not in attributes and tag not in ("link", "iframe", "object", "embed")
            links.extend([attributes["href"]] if "href" in attributes else [])

    Tags().feed(text)
    assert links and all((page.parent / link).is_file() for link in links)
    assert not re.findall(
        r"url\(|@import|XMLHttp|WebSocket|import\(|\.src\b|https?:",
        text.replace("http://www.w3.org/2000/svg", ""),
    )
    policy = re.search(r"default-src 'none'; base-uri 'none';\s+form-action 'none';(.*?)\"", text)
    assert ("connect-src 'self'" in policy[1]) == (page == MODEL)  # the browser refuses the rest


@needs_chromium
def test_the_browser_refuses_what_is_not_in_the_file(browser):
    browser.open("#1")
    assert browser.run("performance.getEntriesByType('resource').length") == 0
    assert browser.run("fetch('00_one_token.md').then(() => 'came', () => 'refused')") == "refused"


# ------------------------------------------------------------------------------ explore_model.html


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server of the page, weights/tiny, and as the model after BNF one with other weights."""
    root = tmp_path_factory.mktemp("served")
    (root / "tutorials").mkdir()
    shutil.copy(MODEL, root / "tutorials")
    before, after = root / "weights/tiny", root / "runs/small/bnf/model"
    shutil.copytree(MODEL.parent.parent / "weights" / "tiny", before)
    shutil.copytree(before, after)
    model, noise = load(before), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=noise))
    save(model, after)
    handler = partial(Quiet, directory=root)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/tutorials/{MODEL.name}"
        yield address, [load(folder, dtype=torch.float64) for folder in (before, after)]
        server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def open_model(browser, address):
    browser.open("", page=address, width=390)
    browser.wait("!document.getElementById('place').hidden")


def asked(text: str) -> list[int]:
    tokenizer = load_tokenizer(MODEL.parent.parent / "weights" / "tiny")
    return tokenizer.encode_chat([{"role": "user", "content": text}], add_generation_prompt=True)


@needs_chromium
def test_the_page_reads_text_as_the_tokenizer_does(browser, served):
    open_model(browser, served[0])
    chance = random.Random(2)
    words = [*"aeost .,?'", " Answer", "Subtract", "17", "  ", "é", "漢", "😀", "\n", "<|end|>"]
    texts = ["", "What is Will's job?", "Subtract 860 from 939.", "Is <|user|> a word?"]
    texts += ["".join(chance.choices(words, k=chance.randrange(20))) for _ in range(100)]
    page = browser.run(
        f"{json.dumps(texts)}.map(x => minibnf.prompt(minibnf.ready().tokenizer, x))"
    )
    for text, ids in zip(texts, page, strict=True):
        assert ids == asked(text), text


@needs_chromium
def test_the_pages_forward_pass_is_the_transformers(browser, served):
    open_model(browser, served[0])
    ids = asked("Emma has 9 pens, drops 4 and finds 7. How many now?")
    for k, model in enumerate(served[1]):
        read = f"minibnf.reader(minibnf.ready().models[{k}])"
        page = browser.run(f"(read => {ids}.map(id => Array.from(read(id))))({read})")
        with torch.no_grad():
            expected = model(torch.tensor([ids]))[0].log_softmax(-1)
        found = torch.tensor(page, dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@needs_chromium
def test_both_answers_are_the_greedy_ones(browser, served):
    open_model(browser, served[0])
    tokenizer = load_tokenizer(MODEL.parent.parent / "weights" / "tiny")
    for k, question in enumerate(browser.run("EXAMPLES")):
        browser.run(f"document.querySelectorAll('#examples button')[{k}].click()")
        rows = browser.run(
            "[...document.querySelectorAll('#answers .row')].map(row =>"
            " [...row.children].map(x => x.textContent))"
        )
        for row, model in zip(rows, served[1], strict=True):
            how = dict(max_new_tokens=64, temperature=0, top_p=1, seed=0, vocab_size=672)
            new = generate(model, [asked(question)], stop_ids=tokenizer.end_ids, **how)[0]
            assert "".join(row) == tokenizer.decode(new, skip_special=False)
    assert browser.run("document.documentElement.scrollWidth") <= 390


@needs_chromium
def test_without_models_the_page_says_what_to_do(browser):
    browser.open("", page=MODEL.as_uri())
    told = "document.getElementById('status').textContent"
    browser.wait(f"{told}.endsWith('run make train-small once, then make explore.')")
    assert browser.run(told).startswith("weights/tiny/tokenizer.model cannot be read")
