"""TRL's own trainers as independent judges: the same model and batch give the same loss and the same gradients.

Theirs: the trainer's processed data set, through its own data loader and compute_loss, on a random tiny Llama, padded.
Ours: the same tokens as Examples, packed, through minibnf's Transformer, loaded from what save_pretrained wrote.
Everything is float32 on both sides (the Llama of transformers has float32 norms whatever it is asked for), so the
tolerances are those of float32; the one test in float64 replaces the model by a table.
"""

import os
import random

import pytest
import torch

pytest.importorskip("trl", reason="the parity extra is not installed: make parity")
transformers = pytest.importorskip("transformers", reason="the parity extra is not installed: make parity")
datasets = pytest.importorskip("datasets", reason="the parity extra is not installed: make parity")
os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from minibnf.data import Example  # noqa: E402

datasets.disable_progress_bars()
WORDS = [f"w{i}" for i in range(40)]
RECORD, KL = [], []
seeds = pytest.mark.parametrize("seed", [0, 1, 2])


# ---------------------------------------------------------------------------------------------------- models and data


def words() -> transformers.PreTrainedTokenizerFast:
    """One token a word."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<pad>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )


def llama(folder, seed: int) -> transformers.LlamaForCausalLM:
    """A random tiny one, also saved to folder; its unembedding is tied for even seeds."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=3 + len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=seed % 2 == 0,
            pad_token_id=1, eos_token_id=2, bos_token_id=None,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    return model


@pytest.fixture
def models_of(tmp_path):
    """seed -> policy, reference, and the folders where minibnf finds them."""

    def make(seed):
        folders = tmp_path / "policy", tmp_path / "reference"
        return llama(folders[0], 2 * seed + seed % 2), llama(folders[1], 2 * seed + 10), folders

    return make


def preferences(seed: int, pairs: int = 5) -> list[dict]:
    """Random pairs of many lengths; some share a prompt; the first two hold responses of the end token alone."""
    draw = random.Random(seed)
    text = lambda least, most: "".join(f" {word}" for word in draw.choices(WORDS, k=draw.randint(least, most)))
    prompts = [text(1, 8)[1:] for _ in range(3)]
    rows = [{"prompt": draw.choice(prompts), "chosen": text(1, 12), "rejected": text(1, 12)} for _ in range(pairs)]
    rows[0]["chosen"] = rows[1]["rejected"] = ""
    return rows


# ------------------------------------------------------------------------------------------------------ theirs and ours


def trainer_of(kind, config, tmp_path, model, rows, reference=None, batch_size=None, **options):
    args = config(
        output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        save_strategy="no", disable_tqdm=True, train_sampling_strategy="sequential", max_length=None if reference else 64,
        per_device_train_batch_size=batch_size or len(rows), **options,
    )  # fmt: skip
    given = {} if reference is None else {"ref_model": reference}
    data = datasets.Dataset.from_list(rows)
    return kind(model=model, args=args, train_dataset=data, processing_class=words(), **given)


def theirs(trainer, batch) -> tuple[float, dict]:
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters()}


def batch_of(trainer) -> dict:
    return next(iter(trainer.get_train_dataloader()))


def rows_of(batch: dict, *prefixes: str) -> list[tuple]:
    """(prompt, response) token ids of every row of a collated batch; TRL's two kinds of collator name things differently."""
    found = []
    for prefix in prefixes or ("",):
        ids, real = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"] == 1
        name = f"{prefix}completion_mask"
        answer = batch[name] == 1 if name in batch else batch[f"{prefix}labels"] != -100
        found += [tuple(tuple(row[m].tolist()) for m in (r & ~a, a)) for row, r, a in zip(ids, real, answer, strict=True)]
    return found


def pairs_of(rows: list[tuple]) -> list[Example]:
    """The first half of the rows are the chosen responses, the second half the rejected ones."""
    halves = zip(rows[: len(rows) // 2], rows[len(rows) // 2 :], strict=True)
    return [Example(x, (y_w, y_l), (True, False), line) for line, ((x, y_w), (_, y_l)) in enumerate(halves, 1)]


def alone(rows: list[tuple], preferred) -> list[Example]:
    return [Example(x, (y,), (bool(s),), line) for line, ((x, y), s) in enumerate(zip(rows, preferred, strict=True), 1)]


class Ours:
    """minibnf's policy and reference, and how its trainer computes loss, gradients and metrics."""

    def __init__(self, folders, max_tokens: int = 60):  # a few examples a micro-batch
        self.model, self.frozen = (load(folder, dtype=torch.float32) for folder in folders)
        self.cache, self.max_tokens = folders[0] / "cache.safetensors", max_tokens

    def reference(self, examples):
        return reference(self.frozen, examples, self.cache, self.max_tokens, torch.float32, "cpu")

    def batches(self, examples):
        return pack(examples, list(range(len(examples))), self.max_tokens)

    def __call__(self, *terms) -> tuple[float, dict, dict]:
        """Σ weight * loss(examples), terms being (weight, name, hyper-parameters, examples): value, gradients, last metrics."""
        total, grads = 0.0, {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}
        for weight, name, hyper, examples in terms:
            ref = self.reference(examples) if LOSSES[name].needs_ref else None
            self.model.zero_grad()
            batches, loss = self.batches(examples), LOSSES[name]
            value, found = run_batches(self.model, batches, loss, loss.hyper(hyper), ref, torch.float32, "cpu", backward=True)
            total += weight * value.item()
            for parameter, p in self.model.named_parameters():
                grads[parameter] += weight * p.grad
        return total, grads, found


def assert_same(one: tuple, other: tuple, loss: float = 1e-6, gradient: float = 1e-5):
    """Losses to a relative error, and every parameter's gradient to one in the Euclidean norm."""
    (value, grads), (expected, expected_grads) = one[:2], other[:2]
    assert grads.keys() == expected_grads.keys()
    assert value == pytest.approx(expected, rel=loss)
    for name, g in expected_grads.items():
        assert g.norm() > 0, name
        assert (grads[name] - g).norm() <= gradient * g.norm(), f"{name}: {((grads[name] - g).norm() / g.norm()).item():.2g}"
    RECORD.append(
        (abs(value / expected - 1), max(((grads[n] - g).norm() / g.norm()).item() for n, g in expected_grads.items()))
    )


def assert_same_metrics(trainer, found: dict):
    kept = {name: values[-1] for name, values in trainer._metrics["train"].items() if name in found}
    assert kept.keys() == found.keys()
    assert found == pytest.approx(kept, rel=1e-5, abs=1e-5)


def by_tokens(pairs: list[Example], weight: float) -> list[float]:
    """TRL averages its NLL over all chosen tokens of the batch, minibnf over each response and then over pairs. So TRL's

    weight w is for each pair i a λ of its own, λ_i = w |y_w,i| / mean |y_w|: (1/P) Σ λ_i S_w,i/|y_w,i| = w Σ S_w,i / Σ |y_w,i|.
    """
    lengths = [len(pair.responses[0]) for pair in pairs]
    return [weight * n * len(pairs) / sum(lengths) for n in lengths]


# ------------------------------------------------------------------------------------------------- with a reference model


@seeds
@pytest.mark.parametrize("beta", [0.05, 0.1, 0.7])
@pytest.mark.parametrize("name, loss_type", [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_dpo_and_ipo(models_of, tmp_path, seed, beta, name, loss_type):
    """The same functions: dpo sums log-ratios over tokens, ipo averages them (the paper sums; its authors mean averages).

    The metrics that have the same names are the same numbers too.
    """
    policy, frozen, folders = models_of(seed)
    trainer = trainer_of(DPOTrainer, DPOConfig, tmp_path, policy, preferences(seed), frozen, loss_type=[loss_type], beta=beta)
    batch = batch_of(trainer)
    expected, pairs = theirs(trainer, batch), pairs_of(rows_of(batch))
    assert {len(y) for pair in pairs for y in pair.responses} > {1}
    found = Ours(folders)((1.0, name, {"beta": beta}, pairs))
    assert_same(found, expected)
    assert_same_metrics(trainer, found[2])


@seeds
@pytest.mark.parametrize("beta, weight", [(0.1, 1.0), (0.5, 0.2)])
def test_dpo_with_nll(models_of, tmp_path, seed, beta, weight):
    """[sigmoid, sft] with weights [1, w] is dpo with lam, but for whose mean the NLL is: see by_tokens.

    So the batch is the mean of its pairs, each with its λ_i; and where all chosen responses are equally long, λ = w.
    """
    policy, frozen, folders = models_of(seed)
    options = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, weight], "beta": beta}
    trainer = trainer_of(DPOTrainer, DPOConfig, tmp_path, policy, preferences(seed), frozen, **options)
    batch = batch_of(trainer)
    expected, pairs, ours = theirs(trainer, batch), pairs_of(rows_of(batch)), Ours(folders)
    lams = by_tokens(pairs, weight)
    assert_same(
        ours(*((1 / len(pairs), "dpo", {"beta": beta, "lam": lam}, [p]) for p, lam in zip(pairs, lams, strict=True))), expected
    )

    equal = [row | {"chosen": " w1 w2 w3"} for row in preferences(seed)]
    policy.zero_grad()
    trainer = trainer_of(DPOTrainer, DPOConfig, tmp_path, policy, equal, frozen, **options)
    batch = batch_of(trainer)
    expected = theirs(trainer, batch)
    assert_same(ours((1.0, "dpo", {"beta": beta, "lam": weight}, pairs_of(rows_of(batch)))), expected)


@seeds
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("beta, lam_d, lam_u", [(0.1, 1.0, 1.0), (0.02, 1.0, 1.3), (0.5, 0.7, 2.0)])
def test_kto(models_of, tmp_path, seed, swapped, beta, lam_d, lam_u):
    """The same function of the same reference point; only whose completions estimate that point differs.

    TRL gives each prompt of the batch the completion of the row before (the first one the last row's), whether or not the
    prompts differ; minibnf's trainer the next example's with another prompt. So here TRL's completions are reproduced from
    its batch, kl_estimate makes the same number of them, and the loss is the same given that number.
    """
    policy, frozen, folders = models_of(seed)
    if swapped:  # so that the estimate is above 0 for some batches and clamped to 0 for others
        policy, frozen, folders = frozen, policy, folders[::-1]
    rows = [
        {"prompt": r["prompt"], "completion": r[k], "label": k == "chosen"}
        for r in preferences(seed)
        for k in ("chosen", "rejected")
    ]
    rows = rows[:-1]
    options = {"beta": beta, "desirable_weight": lam_d, "undesirable_weight": lam_u}
    trainer = trainer_of(KTOTrainer, KTOConfig, tmp_path, policy, rows, frozen, **options)
    batch = batch_of(trainer)
    expected, ours = theirs(trainer, batch), Ours(folders)
    rotated = alone(rows_of(batch, "KL_"), batch["label"])
    kl = kl_estimate(ours.model, ours.reference(rotated), ours.batches(rotated), torch.float32, "cpu")
    assert kl.item() == pytest.approx(trainer._metrics["train"]["kl"][-1], rel=1e-5, abs=0)
    examples = alone(rows_of(batch), batch["label"])
    found = ours((1.0, "kto", {"beta": beta, "lam_d": lam_d, "lam_u": lam_u, "kl": kl}, examples))
    KL.append(kl.item())
    assert_same(found, expected)
    assert_same_metrics(trainer, found[2])


@seeds
def test_kto_of_pairs(models_of, tmp_path, seed):
    """Both take a pair for two responses, each an example of its own."""
    policy, frozen, folders = models_of(seed)
    trainer = trainer_of(KTOTrainer, KTOConfig, tmp_path, policy, preferences(seed), frozen, batch_size=10)
    batch = batch_of(trainer)
    assert batch["label"].tolist() == [True] * 5 + [False] * 5
    expected = theirs(trainer, batch)
    kl = trainer._metrics["train"]["kl"][-1]
    assert_same(Ours(folders)((1.0, "kto", {"kl": kl}, pairs_of(rows_of(batch)))), expected)


# ---------------------------------------------------------------------------------------------- without a reference model


@seeds
@pytest.mark.parametrize("lam", [0.1, 1.0])
def test_orpo(models_of, tmp_path, seed, lam):
    """TRL's NLL covers the prompt's tokens after its first as well as the chosen response, and is a mean over all of the
    batch's such tokens; the paper's, and minibnf's, is over the response and a mean of means. With N_i = |x_i| - 1 + |y_w,i|
    and a'_i the mean log-probability of those N_i tokens,

        L_TRL = L_orpo + (1/P) Σ a_w,i - Σ N_i a'_i / Σ N_i,

    which here is three kinds of minibnf's losses: orpo, less nll of the chosen responses, plus for each pair nll of an
    example whose prompt is the prompt's first token.
    """
    policy, _, folders = models_of(seed)
    trainer = trainer_of(ORPOTrainer, ORPOConfig, tmp_path, policy, preferences(seed), beta=lam)
    batch = batch_of(trainer)
    expected, rows = theirs(trainer, batch), rows_of(batch, "chosen_", "rejected_")
    pairs, chosen = pairs_of(rows), rows[: len(rows) // 2]
    whole = alone([(x[:1], x[1:] + y) for x, y in chosen], [True] * len(chosen))
    N = [len(example.responses[0]) for example in whole]
    terms = [(n / sum(N), "nll", {}, [example]) for n, example in zip(N, whole, strict=True)]
    found = Ours(folders)((1.0, "orpo", {"lam": lam}, pairs), (-1.0, "nll", {}, alone(chosen, [True] * len(chosen))), *terms)
    assert_same(found, expected)


@seeds
@pytest.mark.parametrize("beta, weight", [(0.1, 1.0), (0.3, 0.5), (0.1, 0.0)])
def test_cpo(models_of, tmp_path, seed, beta, weight):
    """cpo_alpha weighs an NLL that is a mean over all chosen tokens of the batch: see by_tokens."""
    policy, _, folders = models_of(seed)
    trainer = trainer_of(CPOTrainer, CPOConfig, tmp_path, policy, preferences(seed), beta=beta, cpo_alpha=weight)
    batch = batch_of(trainer)
    expected, pairs = theirs(trainer, batch), pairs_of(rows_of(batch, "chosen_", "rejected_"))
    lams = by_tokens(pairs, weight)
    terms = [(1 / len(pairs), "cpo", {"beta": beta, "lam": lam}, [p]) for p, lam in zip(pairs, lams, strict=True)]
    assert_same(Ours(folders)(*terms), expected)


@seeds
@pytest.mark.parametrize("beta, gamma", [(2.0, 1.0), (0.1, 0.5), (10.0, 3.0)])
def test_simpo(models_of, tmp_path, seed, beta, gamma):
    """The same function once cpo_alpha, the weight of an NLL that SimPO has not, is 0 instead of its default 1."""
    policy, _, folders = models_of(seed)
    options = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": beta, "simpo_gamma": gamma}
    trainer = trainer_of(CPOTrainer, CPOConfig, tmp_path, policy, preferences(seed), **options)
    batch = batch_of(trainer)
    expected, pairs = theirs(trainer, batch), pairs_of(rows_of(batch, "chosen_", "rejected_"))
    assert_same(Ours(folders)((1.0, "simpo", {"beta": beta, "gamma": gamma}, pairs)), expected)
