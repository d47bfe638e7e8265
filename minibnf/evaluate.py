"""What a model makes of held-out data; what alignment changed.

    minibnf evaluate --model runs/first/model --base weights/smollm2-135m-instruct --data held-out.jsonl

A model is measured on the rows of a file (JSON Lines, a JSON array, Parquet), whose fields say what
is measured:

preference   TRL's preference rows. Accuracy is the share of pairs whose chosen response is more likely than the rejected,
             a tie counting half: by log-likelihood, by its mean a token, and with --base by its shift against the base,
             the implicit reward. (The difference of a log-likelihood to the base's is that shift.)
likelihood   {"prompt", "completion"} or {"question", "answer"}: log-likelihoods of the given answers, perplexity.
choice       {"prompt" or "question", "choices": [texts], "answer": index from 0, or letter}, as MMLU has it, or
             {.., "choices": {"text": [..], "label": [..]}, "answerKey": label}, as ARC and CommonsenseQA have it. Accuracy
             is the share of rows whose right choice is the likeliest, by log-likelihood, and by that a token, character
             or UTF-8 byte (lm-eval's acc, acc_norm and acc_bytes; as there, the end of a turn is not counted).
gsm8k        {"question", "answer" that ends in "#### 42"}: greedy answers, right where the last number equals that one, and
             the log-likelihood of the answer given (--task likelihood measures that alone and generates nothing).

A prompt and what follows it are text as it stands (a choice begins with its own space) or messages. A question is what a user
says, by the model's chat template; for a model that has none, the text "Question: ..." and on the next line "Answer: ...",
after the token with which the tokenizer begins a text, if it does.
"system", "tools" and "chat_template_kwargs" beside messages or a question reach the template (rows.py).
A number is digits, with commas between groups of three or without, with decimals or without. A currency sign may stand before
it; a minus counts unless a letter, digit or closing bracket stands before that (-$4, $-4, x=-4, but 9 in 10-9). Numbers are
compared by value: 1,200.50 is 1200.5. The last number of 1/2 is 2, of 50% it is 50.

The intervals are of 95 %: Wilson's for a share, 1.96 standard errors for a mean (rows are what was drawn, tokens are not). With
--base follow its value and the difference over the same rows, paired; of shares by Agresti and Min, who add half a row to each
outcome: to have seen no difference is not to know that there is none.
"""

import argparse
import math
import re
import sys
from collections.abc import Iterable
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from minibnf.data import Example, digest, pairs_of, token_ids
from minibnf.files.config import announce_ignored
from minibnf.files.disk import check_output, write_json
from minibnf.files.messages import text_or_messages
from minibnf.files.rows import Notes, Place, Record, each_row, parse_row, record_of, scan_rows
from minibnf.files.tokenizer import Tokenizer, load_tokenizer
from minibnf.generate import generate
from minibnf.machine import memory_advice, resolve_device_and_dtype
from minibnf.model import load
from minibnf.step import read_responses

# ------------------------------------------------------------------------------------------------------------- reading

DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
NUMBER = re.compile(rf"(?:(?<![\w)\]}}])([-−]))?(?:[$€£¥]([-−])?)?({DIGITS})")


def last_number(text: str) -> Decimal | None:
    """The value of the last number in a text, as the top of the file defines it; None where there is none."""
    if not (found := NUMBER.findall(text)):
        return None
    *minus, digits = found[-1]
    return Decimal(digits.replace(",", "")) * (-1 if any(minus) else 1)


class Row(NamedTuple):
    """A row of the data as token ids, and what else its task needs: the texts of the choices, or the number."""

    example: Example
    extra: list[str] | Decimal | None


# Each task reads a row as rows.parse_row does: -> Record, and the extra.


def _preference(row: dict, where, tokenizer: Tokenizer) -> tuple[Record, None]:
    return parse_row(row, where), None


def _likelihood(row, where, tokenizer):
    if "prompt" in row:
        return parse_row({**row, "label": True}, where), None
    return _answered(row, where, tokenizer, "answer", [row.get("answer")], (True,)), None


def _gsm8k(row, where, tokenizer):
    _, marker, tail = str(row.get("answer")).rpartition("####")
    if not marker or not NUMBER.fullmatch(tail.strip()):
        raise ValueError(
            f"{where}: field 'answer' must end in a number after ####, such as '#### 42'"
        )
    return _answered(row, where, tokenizer, "answer", [row["answer"]], (True,)), last_number(tail)


def _choice(row, where, tokenizer):
    texts, answer, labels = (
        row.get("choices"),
        row.get("answer", row.get("answerKey")),
        "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    )
    if isinstance(texts, dict):
        texts, labels = texts.get("text"), texts.get("label")
    if not isinstance(texts, list) or len(texts) < 2 or not isinstance(labels, str | list):
        raise ValueError(
            f"{where}: field 'choices' must be a list of two texts or more, or hold lists 'text' and 'label'"
        )
    right = (
        list(labels).index(answer) if isinstance(answer, str) and answer in list(labels) else answer
    )
    if type(right) is not int or not 0 <= right < len(texts):
        raise ValueError(
            f"{where}: the answer {answer!r} is none of the {len(texts)} choices (an index from 0, or a label)"
        )
    preferred = tuple(k == right for k in range(len(texts)))
    return _answered(row, where, tokenizer, "choices", texts, preferred), texts


def _answered(row, where, tokenizer: Tokenizer, field: str, texts: list, preferred) -> Record:
    """The Record of a prompt or question, with texts as completions of it."""
    question, space = row.get("question"), ""
    if "prompt" in row:
        prompt = text_or_messages(row["prompt"], where, "prompt")
    elif not isinstance(question, str) or not question:
        raise ValueError(f"{where}: field 'question' must be text and not empty")
    elif tokenizer.source is not None:
        prompt = [{"role": "user", "content": question}]
    else:
        prompt, space = f"Question: {question}\nAnswer:", " "
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{where}: field '{field}' must be text and not empty")
    if isinstance(prompt, str):
        completions = [(field, space + text) for text in texts]
    else:
        completions = [(field, [{"role": "assistant", "content": text}]) for text in texts]
    used = ("prompt" if "prompt" in row else "question", "choices", "answer", "answerKey")
    return record_of(row, where, prompt, completions, preferred, used)


TASKS = {"preference": _preference, "likelihood": _likelihood, "choice": _choice, "gsm8k": _gsm8k}


def task_of(row: dict, where: str) -> str:
    """The task that a row's fields decide. Raises ValueError where they decide none."""
    if {"chosen", "rejected", "label"} & set(row):
        return "preference"
    if "choices" in row:
        return "choice"
    if {"question", "answer"} <= set(row):
        return "gsm8k" if "####" in str(row["answer"]) else "likelihood"
    if {"prompt", "completion"} <= set(row):
        return "likelihood"
    raise ValueError(
        f"{where}: its fields {', '.join(map(repr, row))} belong to no task; --help says which do"
    )


def tokenised(
    scanned: Iterable, tokenizer: Tokenizer, task: str = "auto", notes: Notes | None = None
) -> tuple[str, list[Row]]:
    """The task ("auto": what the first row's fields say), and its rows; notes as read_examples.

    scanned: what rows.scan_rows yields. Raises ValueError as rows.each_row, and as scan_rows.
    """
    scanned = list(scanned)
    if task == "auto":
        first = next((pair for pair in scanned if isinstance(pair[1], dict)), None)
        task = task_of(first[1], first[0]) if first else "preference"
    end = tokenizer.end_ids if task == "choice" else ()

    def read(row: dict, place: Place) -> Row:
        record, extra = TASKS[task](row, place, tokenizer)
        if notes:
            notes.add(record, place, tokenizer)
        prompt, responses = token_ids(tokenizer, record, place)
        responses = tuple(r[:-1] if r[-1] in end else r for r in responses)
        if not all(responses):
            field = record.completions[responses.index(())][0]
            raise ValueError(
                f"{place}: field '{field}' is empty; a response needs at least one token"
            )
        pairs = record.pairs
        return Row(
            Example(prompt, responses, record.preferred, place.number, pairs, place.unit), extra
        )

    return task, each_row(scanned, read)


# ----------------------------------------------------------------------------------------------------------- measuring


class Measured(NamedTuple):
    """What a model made of the rows: (R,) the log-likelihood of each response in nats, (R,) its tokens, both float64; for
    gsm8k the answers that it generated, each with whether it came to an end."""

    sums: Tensor
    lengths: Tensor
    answers: list[tuple[str, bool]]


def measure(
    model, tokenizer: Tokenizer, task: str, rows: list[Row], max_tokens=None, max_new_tokens=256
) -> Measured:
    """What a model makes of the rows.

    Raises ValueError for a row longer than the model's context, or than max_tokens (None: what
    suits the device).
    """
    examples, context = [row.example for row in rows], model.config.max_position_embeddings
    for e in examples:
        needed = len(e.prompt) + max(
            *map(len, e.responses), max_new_tokens if task == "gsm8k" else 0
        )
        if needed > context:
            raise ValueError(
                f"{e.place} of the data: prompt and answer need {needed} tokens, and the model reads {context}"
            )
    default = max(
        2048 if model.unembed.device.type == "cpu" else 16384, *(e.tokens for e in examples)
    )
    read = read_responses(model, examples, max_tokens or default)
    sums, lengths = [x.double().sum() for x in read], [len(x) for x in read]
    equal = {}  # responses of a row that are the same tie, however rounding differs between their places in a batch
    for place, response in enumerate(
        (e.line, response) for e in examples for response in e.responses
    ):
        sums[place] = equal.setdefault(response, sums[place])
    answers, prompts = [], [list(e.prompt) for e in examples] if task == "gsm8k" else []
    stop = sorted(tokenizer.end_ids)
    how = {"max_new_tokens": max_new_tokens, "temperature": 0, "stop_ids": stop}
    for i in tqdm(
        range(0, len(prompts), 64),
        desc="answering",
        unit="64 rows",
        disable=None if prompts else True,
        leave=False,
    ):
        for ids in generate(model, prompts[i : i + 64], vocab_size=tokenizer.vocab_size, **how):
            answers.append((tokenizer.decode(ids), ids[-1] in stop))
    return Measured(torch.stack(sums), torch.tensor(lengths).double(), answers)


class Figure(NamedTuple):
    """A figure is the mean of one number a row (n,), float64; those of a share are 0, 1 or, for a tie, a half."""

    rows: Tensor
    share: bool = False


def share(x) -> Figure:
    return Figure(torch.as_tensor(x).double(), share=True)


def wins(x: Tensor, y: Tensor) -> Figure:
    """The share of rows in which x (n,) exceeds y, a tie counting half."""
    return share((x > y) + 0.5 * (x == y))


def per_token(sums: Tensor, lengths: Tensor) -> Figure:
    """The mean over all tokens, a ratio of two means: its rows are the ratio's linearisation."""
    ratio = sums.sum() / lengths.sum()
    return Figure(ratio + (sums - ratio * lengths) / lengths.mean())


def figures(
    task: str, rows: list[Row], found: Measured, base: Measured | None = None
) -> dict[str, Figure]:
    """Every figure of a task by its name in the table."""
    sums, lengths, answers = found
    preferred = torch.tensor([p for row in rows for p in row.example.preferred])
    sizes = torch.tensor([len(row.example.responses) for row in rows])
    table, names = {}, {"given answer": preferred}
    if task == "preference":
        pairs, names = (
            pairs_of([row.example for row in rows]),
            {"chosen": preferred, "rejected": ~preferred},
        )
        if len(pairs):
            chosen, rejected = sums[pairs].unbind(1)
            table["accuracy by log-likelihood"] = wins(chosen, rejected)
            table["accuracy by log-likelihood / token"] = wins(*(sums / lengths)[pairs].unbind(1))
            table["chosen less rejected (nats)"] = Figure(chosen - rejected)
        if len(pairs) and base:
            table["accuracy by shift against the base"] = wins(*(sums - base.sums)[pairs].unbind(1))
    if task == "choice":
        names = {"right choice": preferred}
        texts = [text.lstrip() for row in rows for text in row.extra]
        characters, of_bytes = (torch.tensor([len(f(t)) for t in texts]) for f in (str, str.encode))
        for name, scale in (
            ("", 1),
            (" / token", lengths),
            (" / character", characters),
            (" / byte", of_bytes),
        ):
            best = [int(x.argmax()) for x in (sums / scale).split(sizes.tolist())]
            table[f"accuracy by log-likelihood{name}"] = share(
                [row.example.preferred[k] for row, k in zip(rows, best, strict=True)]
            )
    if task == "gsm8k":
        numbers = [last_number(text) for text, _ in answers]
        table["accuracy"] = share([n == row.extra for n, row in zip(numbers, rows, strict=True)])
        table["answers without a number"] = share([n is None for n in numbers])
        table["answers cut at --max-new-tokens"] = share([not ended for _, ended in answers])
    for name, which in names.items():
        if which.any():
            table[f"log-likelihood, {name} (nats)"] = Figure(sums[which])
            table[f"log-likelihood, {name} (nats / token)"] = per_token(sums[which], lengths[which])
    if task in ("likelihood", "gsm8k"):
        rate = per_token(sums, lengths).rows
        table["perplexity"] = Figure((-rate.mean()).exp() * (1 - rate + rate.mean()))
    return table


# ---------------------------------------------------------------------------------------------------------- intervals


def interval(figure: Figure) -> tuple[float, float]:
    """95 %, of a share or of a mean; nan for the mean of one row."""
    n, mean = len(figure.rows), figure.rows.mean().item()
    if not figure.share:
        half = 1.96 * figure.rows.std().item() / math.sqrt(n) if n > 1 else math.nan
        return mean - half, mean + half
    centre, half = (
        mean + 1.96**2 / (2 * n),
        1.96 * math.sqrt(mean * (1 - mean) / n + (1.96 / (2 * n)) ** 2),
    )
    return max(0.0, (centre - half) / (1 + 1.96**2 / n)), min(
        1.0, (centre + half) / (1 + 1.96**2 / n)
    )


def paired_interval(figure: Figure, base: Figure) -> tuple[float, float]:
    """95 %, of the difference of two shares or means over the same rows."""
    d = figure.rows - base.rows
    if not figure.share:
        return interval(Figure(d))
    n = (
        len(d) + 2
    )  # the two rows more: half a row right and wrong, half wrong and right, and two halves without difference
    mean, square = d.sum().item() / n, (d.square().sum().item() + 1) / n
    half = 1.96 * math.sqrt((square - mean**2) / n)
    return mean - half, mean + half


def table_of(found: dict[str, Figure], base: dict[str, Figure]) -> dict[str, dict[str, float]]:
    """{name: {"rows", "value", "low", "high"}}, and where the base has the figure its value and the difference too."""
    table = {}
    for name, figure in found.items():
        (low, high), value = interval(figure), figure.rows.mean().item()
        table[name] = {"rows": len(figure.rows), "value": value, "low": low, "high": high}
        if name in base:
            (low, high), before = paired_interval(figure, base[name]), base[name].rows.mean().item()
            table[name] |= {
                "base": before,
                "difference": value - before,
                "difference_low": low,
                "difference_high": high,
            }
    return table


# --------------------------------------------------------------------------------------------------------- the command


def on_data(args: argparse.Namespace) -> None:
    """Measure --model, and --base where there is one, on the rows of --data: print the table, write --out."""
    if args.out:  # what cannot be written is to be known now
        out = Path(args.out)
        check_output(out, [Path(p) for p in (args.data, args.model, args.base) if p])
        if out.exists() and not args.overwrite:
            raise ValueError(f"{out} exists already; --overwrite replaces it")
        out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer, measured, notes = load_tokenizer(args.model), [], Notes()
    scanned = list(islice(scan_rows(args.data), args.limit))
    task, rows = tokenised(scanned, tokenizer, args.task, notes)
    for note in notes.lines():
        print(note)
    data = digest([row.example for row in rows])
    others = rows
    if args.base:
        tokenizer_of_base = load_tokenizer(args.base)
        tokenizer_of_base.now = tokenizer.now  # a template may tell the time
        others = tokenised(scanned, tokenizer_of_base, task)[1]
    if data != digest([row.example for row in others]):
        raise ValueError(
            f"the tokenizers of {args.base} and {args.model} make different tokens of {args.data}"
        )
    for directory in filter(None, (args.model, args.base)):
        model = load(directory)
        announce_ignored(directory, model.raw)
        device, dtype = resolve_device_and_dtype(
            args.device, args.dtype, sum(p.numel() for p in model.parameters())
        )
        model = model.to(device=device, dtype=dtype)
        measured.append(measure(model, tokenizer, task, rows, args.max_tokens, args.max_new_tokens))
        del model  # one in memory at a time
    base = measured[1] if args.base else None
    table = table_of(
        figures(task, rows, measured[0], base), figures(task, rows, base) if base else {}
    )
    same = sum(len(set(row.example.responses)) < len(row.example.responses) for row in rows)
    dtype = str(dtype).removeprefix("torch.")
    print(
        f"{args.data}: {len(rows)} rows of {task}, {device}, {dtype}"
        + (f", {same} with equal responses" if same else "")
    )
    print(f"\n{'':44}{'rows':>5}{'value':>10}{'95 % interval':>20}", end="")
    print(f"{'base':>10}{'difference':>12}{'95 % interval':>20}" if base else "")
    for name, x in table.items():
        print(f"{name:44}{x['rows']:5}{x['value']:10.3f}{x['low']:10.3f}{x['high']:10.3f}", end="")
        print(
            "{base:10.3f}{difference:+12.3f}{difference_low:+10.3f}{difference_high:+10.3f}".format(
                **x
            )
            if "base" in x
            else ""
        )
    if len(rows) < 30:
        print(f"\n{len(rows)} rows are few: intervals of means are too narrow below about 30")
    if args.out:
        table = {
            name: {k: v if v == v else None for k, v in x.items()} for name, x in table.items()
        }  # JSON has no nan
        settings = {k: v for k, v in vars(args).items() if k != "overwrite"}
        settings |= {"task": task, "device": str(device), "dtype": dtype, "data_sha256": data}
        names = ("model", "base") if base else ("model",)
        answers = [
            {"line": row.example.line, "number": str(row.extra)}
            | {who: m.answers[i][0] for who, m in zip(names, measured, strict=True)}
            for i, row in enumerate(rows if task == "gsm8k" else [])
        ]
        write_json(Path(args.out), {"settings": settings, "figures": table, "answers": answers})


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser("minibnf evaluate", description=__doc__, allow_abbrev=False)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument(
        "--model", required=True, metavar="DIR", help="the model to measure, in Hugging Face layout"
    )
    p.add_argument("--base", metavar="DIR", help="the model before alignment, to compare with")
    a = p.add_argument
    a("--data", required=True, metavar="FILE", help="rows, see above")
    a(
        "--task",
        choices=["auto", *TASKS],
        default="auto",
        help="auto: what the fields of the first row say",
    )
    a("--limit", type=int, metavar="N", help="the first N rows alone")
    a(
        "--max-new-tokens",
        type=int,
        default=256,
        metavar="N",
        help="of an answer in gsm8k; default 256",
    )
    a(
        "--out",
        metavar="FILE",
        help="write all figures and settings, and the answers of gsm8k, as JSON",
    )
    a("--overwrite", action="store_true", help="replace an --out that exists")
    a("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA when present")
    a(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="of weights and products. auto: as in training",
    )
    a(
        "--max-tokens",
        type=int,
        metavar="N",
        help="tokens read at once: bounds memory; default 2048 on a CPU, 16384 on CUDA",
    )
    args = p.parse_args(argv)
    for name in ("limit", "max_new_tokens", "max_tokens"):
        if (x := getattr(args, name)) is not None and x < 1:
            p.error(f"--{name.replace('_', '-')} must be 1 or more")
    if args.overwrite and not args.out:
        p.error("--overwrite goes with --out")
    advice = f"lower --max-tokens (now {args.max_tokens or 'its default'})"
    try:
        with memory_advice(advice):
            on_data(args)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
