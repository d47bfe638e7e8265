"""Measure a model on held-out data, and what alignment changed.

    minibnf evaluate --model runs/first/model --base weights/tiny --data held-out.jsonl

A model is measured on the rows of a file (JSON Lines, a JSON array, Parquet). The fields of the
first row say what is measured:

preference   TRL's preference rows. Accuracy is the share of pairs whose chosen response is more
             likely than the rejected one; a tie counts half. It is given by log-likelihood, by its
             mean per token, and with --base by its shift against the base, the implicit reward.
likelihood   {"prompt", "completion"} or {"question", "answer"}: the log-likelihoods of the given
             answers, and their perplexity.

A prompt and a completion are text as it stands, or messages. A question is what a user says, by the
model's chat template. For a model without a template it is the text "Question: ..." and on the
next line "Answer: ...", after the token with which the tokenizer begins a text, if it has one.
"system", "tools" and "chat_template_kwargs" beside messages or a question reach the template
(files/rows.py).

Each interval is a 95 % interval: Wilson's for a share, 1.96 standard errors for a mean, over rows
and not over tokens. With --base, the base's value and the difference over the same rows follow. The
interval of a difference of two shares is Agresti and Min's, who add half a row to each outcome:
having seen no difference does not prove that there is none.

Multiple choice, GSM8K and other benchmarks are lm-eval's, which loads OUT/model as it is. A task
can be a file of your own, and then it needs no network (tests/parity/test_lm_eval.py runs this):

    lm_eval run --model hf --model_args pretrained=OUT/model --tasks tests/parity/small_world.yaml
"""

import argparse
import math
import re
import sys
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minibnf.data import Example, digest, example_of, pairs_of
from minibnf.files.disk import check_output, write_json
from minibnf.files.rows import Notes, Place, Record, each_row, parse_row, record_of, scan_rows
from minibnf.files.terminal import ArgumentParser, counted, in_one_line, positive, show
from minibnf.files.tokenizer import Tokenizer, load_tokenizer
from minibnf.generate import dtype_name, load_on
from minibnf.machine import add_machine, memory_advice
from minibnf.step import read_responses

# ------------------------------------------------------------------------------------ last numbers

DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
NUMBER = re.compile(rf"(?:(?<![\w)\]}}])([-−]))?(?:[$€£¥]([-−])?)?({DIGITS})")


def last_number(text: str) -> Decimal | None:
    """The value of the last number in a text, None where there is none.

    A number is digits, with commas between groups of three or without, with decimals or without.
    A currency sign may stand before it. A minus counts unless a letter, digit or closing bracket
    stands before it: -$4, $-4, x=-4, but 9 in 10-9. The value is what counts: 1,200.50 is 1200.5.
    The last number of 1/2 is 2, of 50% it is 50.
    """
    numbers = NUMBER.findall(text)
    if not numbers:
        return None
    *minus, digits = numbers[-1]
    value = Decimal(digits.replace(",", ""))
    return -value if any(minus) else value


# ----------------------------------------------------------------------------------------- reading


def task_of(row: dict, where) -> str:
    """The task that a row's fields decide. Raises ValueError where they decide none."""
    if {"chosen", "rejected", "label"} & set(row):
        return "preference"
    if "choices" in row:
        raise ValueError(f"{where}: lm-eval measures multiple choice; --help shows how")
    if {"question", "answer"} <= set(row) or {"prompt", "completion"} <= set(row):
        return "likelihood"
    fields = ", ".join(map(repr, row))
    raise ValueError(f"{where}: its fields {fields} fit no task; --help lists those that do")


def record_for(task: str, row: dict, where, tokenizer: Tokenizer) -> Record:
    """A row as its task reads it."""
    if task == "preference":
        return parse_row(row, where)
    if "prompt" in row:
        return parse_row({**row, "label": True}, where)
    texts = {"question": row.get("question"), "answer": row.get("answer")}
    for field, text in texts.items():
        if not isinstance(text, str) or not text:
            raise ValueError(f"{where}: field '{field}' must be text and not empty")
        made = {*tokenizer.backend.encode(text, True)} - {*tokenizer.backend.unknown}
        for token, i in tokenizer.control.items() if tokenizer.source is None else ():
            if i in made:
                raise ValueError(
                    f"{where}: field '{field}' spells the control token {token!r}, and without a "
                    "chat template it would be read as one: take it out"
                )
    if tokenizer.source is None:  # no chat template
        prompt, completion = f"Question: {row['question']}\nAnswer:", f" {row['answer']}"
    else:
        prompt = [{"role": "user", "content": row["question"]}]
        completion = [{"role": "assistant", "content": row["answer"]}]
    return record_of(row, where, prompt, [("answer", completion)], (True,), texts)


def tokenised(scanned, tokenizer: Tokenizer, task: str, notes: Notes | None = None):
    """The examples of what rows.scan_rows yields; errors and notes as in data.read_examples."""

    def read(row: dict, place: Place) -> Example:
        return example_of(record_for(task, row, place, tokenizer), place, tokenizer, notes)

    return each_row(scanned, read)


# --------------------------------------------------------------------------------------- measuring


class Measured(NamedTuple):
    """What a model made of each response: its log-likelihood in nats, and its tokens."""

    sums: Tensor  # (R,) float64
    lengths: Tensor  # (R,) float64


def measure(model, examples: list[Example], max_tokens: int | None = None) -> Measured:
    """What a model makes of the responses; max_tokens: read at once (None: what suits the device).

    Raises ValueError for a row longer than the model's context, or than max_tokens.
    """
    context = model.config.max_position_embeddings
    for e in examples:
        size = len(e.prompt) + max(map(len, e.responses))
        if size > context:
            raise ValueError(
                f"{e.place} of the data has {size} tokens, and the model reads {context} at most: "
                "shorten the row or leave it out"
            )
    if not max_tokens:
        enough = 2048 if model.unembed.device.type == "cpu" else 16384
        max_tokens = max(enough, *(e.tokens for e in examples))
    logps = read_responses(model, examples, max_tokens)
    # Equal responses of a row are to tie, however rounding differs between their places in a batch.
    keys = [(e.line, response) for e in examples for response in e.responses]
    for (line, _), x in zip(keys, logps, strict=True):
        if not x.isfinite().all():
            raise FloatingPointError(
                f"the model's log-probabilities in {examples[0].unit} {line} of the data are not "
                "finite: its weights are too large to be measured"
            )
    sum_of = {key: x.double().sum() for key, x in zip(keys, logps, strict=True)}
    lengths = torch.tensor([len(x) for x in logps]).double()
    return Measured(torch.stack([sum_of[key] for key in keys]), lengths)


class Figure(NamedTuple):
    """The mean of one number per row; in a share each is 0, 1 or, for a tie, a half."""

    rows: Tensor  # (n,) float64
    share: bool = False


def wins(x: Tensor, y: Tensor) -> Tensor:
    """1 where x exceeds y, a half where they tie, else 0."""
    return (x > y) + 0.5 * (x == y)


def per_token(sums: Tensor, lengths: Tensor) -> Figure:
    """The mean over all tokens, a ratio of two means: its rows are the ratio's linearisation."""
    ratio = sums.sum() / lengths.sum()
    return Figure(ratio + (sums - ratio * lengths) / lengths.mean())


def figures(
    task: str, examples: list[Example], measured: Measured, base: Measured | None = None
) -> dict[str, Figure]:
    """Every figure of a task by its name in the table."""
    sums, lengths = measured
    preferred = torch.tensor([p for e in examples for p in e.preferred])
    pairs, table = pairs_of(examples), {}
    if len(pairs):
        scores = {"log-likelihood": sums, "log-likelihood / token": sums / lengths}
        if base:
            scores["shift against the base"] = sums - base.sums
        for name, x in scores.items():
            won = wins(*x[pairs].unbind(1))
            table[f"accuracy by {name}"] = Figure(won.double(), share=True)
        table["chosen minus rejected (nats)"] = Figure(sums[pairs[:, 0]] - sums[pairs[:, 1]])
    sides = {"given answer": preferred}
    if task == "preference":
        sides = {"chosen": preferred, "rejected": ~preferred}
    for name, which in sides.items():
        if which.any():
            table[f"log-likelihood, {name} (nats)"] = Figure(sums[which])
            table[f"log-likelihood, {name} (nats / token)"] = per_token(sums[which], lengths[which])
    if task == "likelihood":
        rate = per_token(sums, lengths).rows
        table["perplexity"] = Figure((-rate.mean()).exp() * (1 - rate + rate.mean()))
    return table


# --------------------------------------------------------------------------------------- intervals

Z = 1.96  # standard errors on each side of a 95 % interval


def interval(figure: Figure) -> tuple[float, float]:
    """The 95 % interval of a share or of a mean; nan for the mean of one row."""
    n, mean = len(figure.rows), figure.rows.mean().item()
    if not figure.share:
        half = Z * figure.rows.std().item() / math.sqrt(n) if n > 1 else math.nan
        return mean - half, mean + half
    centre = mean + Z**2 / (2 * n)
    half = Z * math.sqrt(mean * (1 - mean) / n + (Z / (2 * n)) ** 2)
    scale = 1 + Z**2 / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def paired_interval(figure: Figure, base: Figure) -> tuple[float, float]:
    """The 95 % interval of the difference of two shares or means over the same rows.

    Two rows are added to those of shares: half a row won, half a row lost, one without difference.
    """
    differences = figure.rows - base.rows
    if not figure.share:
        return interval(Figure(differences))
    n = len(differences) + 2
    mean, square = differences.sum().item() / n, (differences.square().sum().item() + 1) / n
    half = Z * math.sqrt((square - mean**2) / n)
    return mean - half, mean + half


def table_of(measured: dict[str, Figure], base: dict[str, Figure]) -> dict[str, dict[str, float]]:
    """{name: {"rows", "value", "low", "high"}}, and the difference where the base has it."""
    table = {}
    for name, figure in measured.items():
        value, (low, high) = figure.rows.mean().item(), interval(figure)
        table[name] = {"rows": len(figure.rows), "value": value, "low": low, "high": high}
        if name in base:
            before, (low, high) = base[name].rows.mean().item(), paired_interval(figure, base[name])
            table[name] |= {"base": before, "difference": value - before}
            table[name] |= {"difference_low": low, "difference_high": high}
    return table


# ------------------------------------------------------------------------------------- the command


def read_rows(args: argparse.Namespace) -> tuple[str, list[Example]]:
    """The task and the rows of --data. Raises ValueError where --base reads other tokens."""
    tokenizer, notes = load_tokenizer(args.model), Notes()
    scanned, task = list(islice(scan_rows(args.data), args.limit)), args.task
    if task == "auto":
        named = (task_of(row, place) for place, row in scanned if isinstance(row, dict))
        task = next(named, "preference")
    examples = tokenised(scanned, tokenizer, task, notes)
    for note in notes.lines():
        show(note)
    if args.base:
        tokenizer_of_base = load_tokenizer(args.base)
        tokenizer_of_base.now = tokenizer.now  # a template may tell the time
        if digest(examples) != digest(tokenised(scanned, tokenizer_of_base, task)):
            both = f"{args.base} and {args.model}"
            raise ValueError(
                f"the tokenizers of {both} make different tokens of {args.data}: measure each alone"
            )
    return task, examples


def measure_folder(directory: str, examples: list[Example], args) -> tuple[Measured, dict]:
    """What the model in a folder makes of the rows, and {"device", "dtype"} it was done in."""
    model = load_on(directory, args.device, args.dtype)
    where = {"device": model.unembed.device.type, "dtype": dtype_name(model)}
    return measure(model, examples, args.max_tokens), where


def print_table(table: dict[str, dict[str, float]], with_base: bool) -> None:
    title = f"\n{'':44}{'rows':>5}{'value':>10}{'95 % interval':>20}"
    show(title + (f"{'base':>10}{'difference':>12}{'95 % interval':>20}" if with_base else ""))
    for name, x in table.items():
        line = f"{name:44}{x['rows']:5}{x['value']:10.3f}{x['low']:10.3f}{x['high']:10.3f}"
        if "base" in x:
            line += f"{x['base']:10.3f}{x['difference']:+12.3f}"
            line += f"{x['difference_low']:+10.3f}{x['difference_high']:+10.3f}"
        show(line)


def report(args: argparse.Namespace) -> None:
    """Measure --model, and --base where there is one: print the table, write --out."""
    if args.out:  # before anything is measured
        out = Path(args.out)
        check_output(out, [Path(given) for given in (args.data, args.model, args.base) if given])
        if out.exists() and not args.overwrite:
            raise ValueError(f"{out} exists already; --overwrite replaces it")
        out.parent.mkdir(parents=True, exist_ok=True)
    task, examples = read_rows(args)
    measured, where = measure_folder(args.model, examples, args)
    base, of_base = None, {}
    if args.base:
        base, _ = measure_folder(args.base, examples, args)
        of_base = figures(task, examples, base)
    table = table_of(figures(task, examples, measured, base), of_base)
    rows = counted(len(examples), "row")
    show(f"{args.data}: {rows} of {task}, {where['device']}, {where['dtype']}")
    print_table(table, base is not None)
    if len(examples) < 30:
        show("\nWith fewer than about 30 rows the intervals of means are too narrow")
    if args.out:
        settings = {name: value for name, value in vars(args).items() if name != "overwrite"}
        settings |= {"task": task, **where, "data_sha256": digest(examples)}
        for x in table.values():  # JSON has no nan: null stands for it
            x.update({key: None for key, value in x.items() if math.isnan(value)})
        write_json(out, {"settings": settings, "figures": table})


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = ArgumentParser("minibnf evaluate", description=__doc__, allow_abbrev=False)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    add = p.add_argument
    # fmt: off
    add("--model", required=True, metavar="DIR", help="the model, in Hugging Face layout")
    add("--base", metavar="DIR", help="the model before alignment, to compare with")
    add("--data", required=True, metavar="FILE", help="rows to measure on; see above")
    add("--task", choices=["auto", "preference", "likelihood"], default="auto",
        help="auto: decided by the fields of the first row")
    add("--limit", type=positive, metavar="N", help="measure the first N rows only")
    add("--out", metavar="FILE", help="also write all figures and settings to this JSON file")
    add("--overwrite", action="store_true", help="replace --out where it exists")
    add_machine(add)
    add("--max-tokens", type=positive, metavar="N",
        help="tokens read at once: bounds memory; default 2048 on a CPU, 16384 on CUDA")
    # fmt: on
    return p.parse_args(argv)


@in_one_line
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with memory_advice(f"lower --max-tokens (now {args.max_tokens or 'its default'})"):
        report(args)


if __name__ == "__main__":
    sys.exit(main())
