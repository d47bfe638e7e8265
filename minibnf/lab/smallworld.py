"""The small world's files: a fresh base model, rows to pretrain it on, preference pairs.

    python -m minibnf.lab.smallworld base --out DIR
    python -m minibnf.lab.smallworld rows --count 120000 --seed 0 --out FILE.jsonl
    python -m minibnf.lab.smallworld pairs --model DIR --kind qa --count 1024 --out FILE.jsonl

base writes the config and the tokenizer of a fresh model, rows what it is pretrained on, pairs what
it is aligned with. Questions, problems and their judge are in language.py. All is decided by the
seed.
"""

import argparse
import io
import itertools
import json
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import sentencepiece
from tqdm import tqdm

from minibnf.files.disk import inside, write_json, write_text
from minibnf.files.terminal import ArgumentParser, in_one_line, positive, show
from minibnf.files.tokenizer import load_tokenizer
from minibnf.generate import generate, text_of
from minibnf.lab.language import (
    LONG,
    PEOPLE,
    PEOPLE_OF,
    QA,
    QUESTIONS,
    REASONING,
    Problem,
    endless,
    endless_in_turn,
    long_answer,
    long_question,
    score,
    styled_answer,
)
from minibnf.model import load

# (prompts, n, seed) -> n answers for each prompt
Sample = Callable[[list[str], int, int], list[list[str]]]

# Of pairs: the families, the samples per prompt, the tokens that a sample may have.
KINDS = {"qa": (QA, 4, 64), "math": (REASONING, 6, 64), "long": (LONG, 4, 128)}

# ---- Rows for the trainer, in TRL's formats ----


def _row(prompt: str, **answers: str) -> dict:
    row = {"prompt": [{"role": "user", "content": prompt}]}
    for field, answer in answers.items():
        row[field] = [{"role": "assistant", "content": answer}]
    return row


def pretrain_rows(count: int, seed: int, long: bool = False) -> Iterator[dict]:
    """Unpaired rows, all labelled true: 35% QA, 65% reasoning (train split).

    QA is about all 24 people, in MIXTURE's styles. long: two thirds of it has long answers.
    """
    rng = random.Random(f"pretrain/{seed}")
    questions = list(QUESTIONS)
    # The seed differs from those of problems(), and so do the problems.
    families = [endless(family, "train", f"pretrain/{seed}") for family in REASONING]
    for _ in range(count):
        if rng.random() < 0.35:
            if long and rng.random() < 2 / 3:
                prompt = long_question(rng.choice(PEOPLE), rng)
                answer = long_answer(prompt, rng)
            else:
                prompt = rng.choice(questions)
                answer = styled_answer(*QUESTIONS[prompt], rng)
        else:
            problem = next(rng.choice(families))
            prompt, answer = problem.prompt, problem.answer
        yield _row(prompt, completion=answer) | {"label": True}


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance in pieces, which are nearly tokens.

    A piece is a digit, a word or any other single character.
    """
    a, b = (re.findall(r"[0-9]|[A-Za-z]+|[^0-9A-Za-z]", text) for text in (a, b))
    row = list(range(len(b) + 1))  # row[j]: the distance of b[:j] to as much of a as was read
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def choose(problem: Problem, answers: list[str]) -> tuple[str, str] | None:
    """(chosen, rejected): an answer of the best score and one of the worst, None if all are equal.

    Where several have that score, QA takes the first of each, as the base drew them; reasoning
    takes the two nearest by edit_distance. Empty answers do not count.
    """
    scores = {answer: score(problem, answer) for answer in answers if answer}
    if len(set(scores.values())) < 2:
        return None
    best = [a for a in scores if scores[a] == max(scores.values())]
    worst = [a for a in scores if scores[a] == min(scores.values())]
    if problem.family in REASONING:
        return min(itertools.product(best, worst), key=lambda pair: edit_distance(*pair))
    return best[0], worst[0]


def pairs(kind: str, sample: Sample, count: int, seed: int, split: str = "train") -> list[dict]:
    """`count` pairs {"prompt", "chosen", "rejected"}: both answers are the base's own samples.

    kind "qa", "long": the best against the worst of 4 samples by the judge. "math": of 6 samples,
    the right and the wrong one that are nearest to each other. Prompts are of the split. Where
    samples give no pair, the prompt is left out and another is drawn; QA prompts recur with new
    samples. sample(prompts, n, seed) draws n answers for each prompt, as sampler() does. Raises
    ValueError if fewer than about one prompt in 500 gives a pair.
    """
    families, n, _ = KINDS[kind]
    source = endless_in_turn(families, split, seed)
    rng = random.Random(f"pairs/{kind}/{seed}")
    rows, asked = [], 0
    with tqdm(total=count, desc=f"{kind} pairs", disable=None) as bar:
        while len(rows) < count:
            if asked > 500 * (len(rows) + 4):
                raise ValueError(
                    f"too few usable pairs: {asked} prompts of kind {kind!r} gave {len(rows)}, "
                    "because nearly every prompt's samples all score the same"
                )
            batch = list(itertools.islice(source, 320))  # twice through the QA prompts
            answers = sample([problem.prompt for problem in batch], n, rng.getrandbits(31))
            for problem, texts in zip(batch, answers, strict=True):
                if pair := choose(problem, texts):
                    rows.append(_row(problem.prompt, chosen=pair[0], rejected=pair[1]))
            asked += len(batch)
            bar.update(min(len(rows), count) - bar.n)
    return rows[:count]


def unpaired(rows: Iterable[dict], keep: str) -> list[dict]:
    """Pairs as rows {"prompt", "completion", "label"}; keep is "both", "chosen" or "rejected"."""
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows
        for side in ("chosen", "rejected")
        if keep in ("both", side)
    ]


def sampler(model, tokenizer, kind: str = "qa", *, temperature: float = 1.0) -> Sample:
    """sample(prompts, n, seed) -> n answers of the model to each user prompt, no end of turn.

    KINDS says how many tokens an answer may have. Temperature 0 is greedy.
    """
    how = {"max_new_tokens": KINDS[kind][2], "temperature": temperature}
    how |= {"stop_ids": tokenizer.end_ids, "vocab_size": tokenizer.vocab_size}

    def sample(prompts: list[str], n: int, seed: int) -> list[list[str]]:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        asked = [tokenizer.encode_chat(chat, add_generation_prompt=True) for chat in chats]
        repeated = [ids for ids in asked for _ in range(n)]
        # A control token shows: without it a degenerate answer could look sound.
        texts = [text_of(tokenizer, new) for new in generate(model, repeated, seed=seed, **how)]
        return [texts[i : i + n] for i in range(0, len(texts), n)]

    return sample


# ---- The base model's folder ----

# fmt: off
# <s> is never used.
SPECIAL = ["<unk>", "<s>", "<|end|>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"]
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
CONFIG = IDS | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama",
    "vocab_size": 672,  # 7, 256 bytes and 409 pieces
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False,
    "tie_word_embeddings": True, "initializer_range": 0.02, "dtype": "float32",
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer", "legacy": False,
    "add_bos_token": False, "add_eos_token": False, "add_prefix_space": False,
    "clean_up_tokenization_spaces": False, "spaces_between_special_tokens": False,
    "unk_token": SPECIAL[0], "bos_token": SPECIAL[1], "eos_token": SPECIAL[2],
    "pad_token": SPECIAL[3], "additional_special_tokens": SPECIAL[4:], "model_max_length": 256,
    "chat_template":
        "{% for message in messages %}"
        "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
}
SENTENCEPIECE = {
    "model_type": "bpe", "vocab_size": CONFIG["vocab_size"], "byte_fallback": True,
    "split_digits": True, "character_coverage": 1.0, "normalization_rule_name": "identity",
    "add_dummy_prefix": False, "remove_extra_whitespaces": False, "num_threads": 1,
    "minloglevel": 2, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3,
    "eos_piece": SPECIAL[2], "control_symbols": SPECIAL[4:],
}
# fmt: on


def write_base(directory: str | Path, seed: int = 0) -> None:
    """Write what a fresh tiny model needs: configs and a tokenizer; the trainer draws the weights.

    The tokenizer is sentencepiece BPE, trained on 8,000 pretraining rows of this seed. The same
    seed gives the same bytes.
    """
    rows, tokenizer = pretrain_rows(8000, seed), io.BytesIO()
    texts = (row[field][0]["content"] for row in rows for field in ("prompt", "completion"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=tokenizer, **SENTENCEPIECE
    )
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(tokenizer.getvalue())
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "generation_config.json", IDS)
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)


# ---- The command ----


def parse(argv: list[str] | None) -> argparse.Namespace:
    top = ArgumentParser("python -m minibnf.lab.smallworld")
    top.description = "Make the small world's files."
    commands = top.add_subparsers(dest="command", required=True)
    # fmt: off
    base = commands.add_parser("base", help="config and tokenizer of a fresh tiny model")
    rows = commands.add_parser("rows", help="pretraining rows")
    pairs = commands.add_parser("pairs", help="preference pairs out of a base model's own samples")
    for command in (base, rows, pairs):
        command.add_argument("--out", type=Path, required=True,
                             help="the .jsonl file to write; of base, the folder")
        command.add_argument("--seed", type=int, default=0,
                             help="another seed, another draw; default 0")
    for command in (rows, pairs):
        command.add_argument("--count", type=positive, required=True, help="how many rows")
    rows.add_argument("--long", action="store_true", help="two thirds of QA with long answers")
    pairs.add_argument("--model", required=True, help="folder of the base model")
    pairs.add_argument("--kind", choices=KINDS, required=True,
                       help="answers by style, or right against wrong")
    pairs.add_argument("--split", choices=PEOPLE_OF, default="train",
                       help="of the prompts; default train")
    pairs.add_argument("--unpaired", choices=["both", "chosen", "rejected"],
                       help="unpaired rows, of these sides")
    # fmt: on
    return top.parse_args(argv)


@in_one_line
def main(argv: list[str] | None = None) -> None:
    """The command line: see the top of the file."""
    args = parse(argv)
    if args.command == "base":
        if args.out.is_dir() and any(args.out.iterdir()):
            raise ValueError(f"--out {args.out} is not empty; name another folder")
        write_base(args.out, args.seed)
    elif args.command == "rows":
        write_rows(args.out, pretrain_rows(args.count, args.seed, args.long))
    else:
        if inside(args.out, Path(args.model)):
            raise ValueError(f"--out {args.out} lies in --model {args.model}; name another file")
        sample = sampler(load(args.model), load_tokenizer(args.model), args.kind)
        rows = pairs(args.kind, sample, args.count, args.seed, args.split)
        write_rows(args.out, unpaired(rows, args.unpaired) if args.unpaired else rows)
    show(f"wrote {args.out}")


def write_rows(file: Path, rows: Iterable[dict]) -> None:
    """JSON Lines, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
