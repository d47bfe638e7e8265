"""TRL's own trainers as independent judges: the same model and batch give the same loss and the
same gradients.

Theirs: the trainer's processed data set, through its own data loader and compute_loss, on a random
tiny Llama, padded. Ours: the same tokens as Examples, packed, through minibnf's Transformer, loaded
from what save_pretrained wrote. Both compute in float32 (transformers' norms and TRL's
log-probabilities do so whatever they are given), so the tolerances are float32's, about five times
the largest error seen; in the one test in float64 a table stands for the model."""

import random
from types import SimpleNamespace

import pytest
import torch

MISSING = "the parity extra is not installed: make parity"
pytest.importorskip("trl", reason=MISSING)
transformers = pytest.importorskip("transformers", reason=MISSING)
datasets = pytest.importorskip("datasets", reason=MISSING)

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer  # noqa: E402
from trl.experimental.cpo import CPOConfig, CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOConfig, ORPOTrainer  # noqa: E402

from minibnf.data import Example, pack, pair  # noqa: E402
from minibnf.logprob import token_logps  # noqa: E402
from minibnf.losses import LOSSES, Responses  # noqa: E402
from minibnf.model import load  # noqa: E402
from minibnf.step import batch_logps, kl_estimate, metrics, run_batches  # noqa: E402
from tests.parity.bnf_in_trl import BNFTrainer  # noqa: E402

datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()
# transformers' warn of names that TRL still uses
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
WORDS = [f"w{i}" for i in range(40)]
seeds = pytest.mark.parametrize("seed", [0, 1, 2])


# ---------------------------------------------------------------------------------- models and data


def words() -> transformers.PreTrainedTokenizerFast:
    """One token a word."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<pad>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )


def llama(folder, seed: int):
    """A random tiny one, saved to folder; its unembedding is tied for even seeds."""
    torch.manual_seed(seed)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    words = {"vocab_size": 3 + len(WORDS), "tie_word_embeddings": seed % 2 == 0}
    special = {"pad_token_id": 1, "eos_token_id": 2, "bos_token_id": None}
    config = transformers.LlamaConfig(
        **size, **heads, **words, **special, max_position_embeddings=64, initializer_range=0.2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture
def folders(tmp_path, seed):
    """Where minibnf finds a policy and a reference."""
    for name, number in (("policy", 2 * seed + seed % 2), ("reference", 2 * seed + 10)):
        llama(tmp_path / name, number)
    return tmp_path / "policy", tmp_path / "reference"


def preferences(seed: int, pairs: int = 5) -> list[dict]:
    """Random pairs of many lengths; some share a prompt; the first two hold responses of the end
    token alone."""
    draw = random.Random(seed)
    text = lambda least, most: "".join(
        f" {word}" for word in draw.choices(WORDS, k=draw.randint(least, most))
    )
    prompts = [text(1, 8)[1:] for _ in range(3)]
    rows = [
        {"prompt": draw.choice(prompts), "chosen": text(1, 12), "rejected": text(1, 12)}
        for _ in range(pairs)
    ]
    rows[0]["chosen"] = rows[1]["rejected"] = ""
    return rows


# ---------------------------------------------------------------------------------- theirs and ours


def trainer_of(kind, config, folders, rows, *, reference=False, batch_size=None, **options):
    policy, frozen = map(transformers.LlamaForCausalLM.from_pretrained, folders)
    options |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    options |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    options |= {"train_sampling_strategy": "sequential", "max_length": None if reference else 64}
    options["per_device_train_batch_size"] = batch_size or len(rows)
    args = config(output_dir=str(folders[0].parent / "trl"), **options)
    given = {"ref_model": frozen} if reference else {}
    data = datasets.Dataset.from_list(rows)
    return kind(model=policy, args=args, train_dataset=data, processing_class=words(), **given)


def theirs(kind, config, folders, rows, **options):
    """The trainer, its first batch, and the loss and the gradients that it finds there."""
    trainer = trainer_of(kind, config, folders, rows, **options)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
    return trainer, batch, (loss.item(), gradients)


def rows_of(batch: dict, *prefixes: str) -> list[tuple]:
    """(prompt, response) token ids of every row of a collated batch; TRL's two kinds of collator
    name things differently."""
    found = []
    for prefix in prefixes or ("",):
        ids, real = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"] == 1
        name = f"{prefix}completion_mask"
        answer = batch[name] == 1 if name in batch else batch[f"{prefix}labels"] != -100
        found += [
            tuple(tuple(row[m].tolist()) for m in (r & ~a, a))
            for row, r, a in zip(ids, real, answer, strict=True)
        ]
    return found


def pairs_of(rows: list[tuple]) -> list[Example]:
    """The first half of the rows are the chosen responses, the second half the rejected ones."""
    halves = zip(rows[: len(rows) // 2], rows[len(rows) // 2 :], strict=True)
    return [pair(x, y_w, y_l, line) for line, ((x, y_w), (_, y_l)) in enumerate(halves, 1)]


def alone(rows: list[tuple], preferred) -> list[Example]:
    return [
        Example(x, (y,), (bool(s),), line)
        for line, ((x, y), s) in enumerate(zip(rows, preferred, strict=True), 1)
    ]


class Ours:
    """minibnf's policy and reference, and how its trainer computes loss, gradients and metrics."""

    def __init__(self, folders, max_tokens: int = 60):  # a few examples a micro-batch
        self.model, self.frozen = (load(folder, dtype=torch.float32) for folder in folders)
        self.max_tokens = max_tokens

    @torch.no_grad()
    def referred(self, examples) -> list[Example]:
        """The examples with the reference's log-probabilities, read one by one."""
        found = []
        for i, e in enumerate(examples):
            (batch,) = pack(examples, [i], self.max_tokens)
            logps = batch_logps(self.frozen, batch, LOSSES["bnf"], None)
            found.append(e._replace(ref_logps=logps.split(batch.lengths.tolist())))
        return found

    def batches(self, examples):
        return pack(examples, list(range(len(examples))), self.max_tokens)

    def __call__(self, *terms) -> tuple[float, dict, dict]:
        """Σ weight * loss(examples), terms being (weight, name, hyper-parameters, examples): value,
        gradients, last metrics."""
        total, grads = 0.0, {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}
        for weight, name, hyper, examples in terms:
            self.model.zero_grad()
            loss = LOSSES[name]
            batches = self.batches(self.referred(examples) if loss.needs_ref else examples)
            hyper = loss.hyper(hyper)
            value, sums = run_batches(
                self.model, batches, loss, hyper, torch.float32, backward=True
            )
            total += weight * value.item()
            for parameter, p in self.model.named_parameters():
                grads[parameter] += weight * p.grad
        return total, grads, metrics(batches, sums, hyper.get("beta", 1.0))


def assert_same(one: tuple, other: tuple, loss: float = 2e-6, gradient: float = 1e-5):
    """Losses to a relative error, and every parameter's gradient to one in the Euclidean norm."""
    (value, grads), (expected, expected_grads) = one[:2], other[:2]
    assert grads.keys() == expected_grads.keys()
    assert value == pytest.approx(expected, rel=loss)
    for name, g in expected_grads.items():
        assert g.norm() > 0, name
        assert (error := (grads[name] - g).norm() / g.norm()) <= gradient, (name, error)


def assert_same_metrics(trainer, found: dict):
    kept = {name: values[-1] for name, values in trainer._metrics["train"].items() if name in found}
    assert kept.keys() == found.keys()
    assert found == pytest.approx(kept, rel=1e-5, abs=1e-5)


def by_tokens(pairs: list[Example], name: str, weight: float, **hyper) -> list[tuple]:
    """Terms for Ours, one per pair: the loss `name` with TRL's weight of its NLL.

    TRL averages its NLL over all chosen tokens of the batch, minibnf over each response and then
    over pairs. So TRL's weight w is a λ of its own for each pair i, λ_i = w |y_w,i| / mean |y_w|:

        (1/P) Σ λ_i S_w,i / |y_w,i| = w Σ S_w,i / Σ |y_w,i|
    """
    lengths = [len(pair.responses[0]) for pair in pairs]
    lams = [weight * n * len(pairs) / sum(lengths) for n in lengths]
    return [
        (1 / len(pairs), name, hyper | {"lam": lam}, [one])
        for one, lam in zip(pairs, lams, strict=True)
    ]


# --------------------------------------------------------------------------- with a reference model


@seeds
@pytest.mark.parametrize("beta", [0.05, 0.1, 0.7])
@pytest.mark.parametrize("name, loss_type", [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_dpo_and_ipo(folders, seed, beta, name, loss_type):
    """The same functions: dpo sums log-ratios over tokens, ipo averages them (the paper sums; its
    authors mean averages).

    The metrics that have the same names are the same numbers too.
    """
    options = {"loss_type": [loss_type], "beta": beta, "reference": True}
    trainer, batch, expected = theirs(DPOTrainer, DPOConfig, folders, preferences(seed), **options)
    pairs = pairs_of(rows_of(batch))
    assert {len(y) for pair in pairs for y in pair.responses} > {1}
    found = Ours(folders)((1.0, name, {"beta": beta}, pairs))
    assert_same(found, expected)
    assert_same_metrics(trainer, found[2])


@seeds
@pytest.mark.parametrize("equally_long", [False, True])
@pytest.mark.parametrize("beta, weight", [(0.1, 1.0), (0.5, 0.2)])
def test_dpo_with_nll(folders, seed, equally_long, beta, weight):
    """[sigmoid, sft] with weights [1, w] is dpo with lam, but for what the NLL is a mean of: see
    by_tokens.

    So the batch is the mean of its pairs, each with its λ_i; where all chosen responses are equally
    long, λ = w for all."""
    rows = [row | {"chosen": " w1 w2 w3"} if equally_long else row for row in preferences(seed)]
    options = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, weight], "beta": beta}
    _, batch, expected = theirs(DPOTrainer, DPOConfig, folders, rows, reference=True, **options)
    pairs = pairs_of(rows_of(batch))
    terms = [(1.0, "dpo", {"beta": beta, "lam": weight}, pairs)]
    if not equally_long:
        terms = by_tokens(pairs, "dpo", weight, beta=beta)
    assert_same(Ours(folders)(*terms), expected)


@seeds
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("beta, lam_d, lam_u", [(0.1, 1.0, 1.0), (0.02, 1.0, 1.3), (0.5, 0.7, 2.0)])
def test_kto(folders, seed, swapped, beta, lam_d, lam_u):
    """The same function of the same reference point; what differs is whose completions estimate
    that point.

    TRL gives each prompt of the batch the completion of the row before (the first one the last
    row's), whether or not the prompts differ; minibnf's trainer the next example's with another
    prompt. So TRL's choice is
    taken from its batch here: kl_estimate makes the same number of it, and given that number the
    loss is the same."""
    if swapped:  # the estimate is clamped to 0 one way round and above 0 the other
        folders = folders[::-1]
    rows = [
        {"prompt": r["prompt"], "completion": r[kind], "label": kind == "chosen"}
        for r in preferences(seed)
        for kind in ("chosen", "rejected")
    ]
    rows.pop()  # so that there are more of one kind than of the other
    options = {"beta": beta, "desirable_weight": lam_d, "undesirable_weight": lam_u}
    trainer, batch, expected = theirs(
        KTOTrainer, KTOConfig, folders, rows, reference=True, **options
    )
    ours, rotated = Ours(folders), alone(rows_of(batch, "KL_"), batch["label"])
    batches = ours.batches(ours.referred(rotated))
    kl = kl_estimate(ours.model, batches, LOSSES["kto"], torch.float32)
    assert kl.item() == pytest.approx(trainer._metrics["train"]["kl"][-1], abs=1e-5)
    assert (kl > 0) == swapped
    examples = alone(rows_of(batch), batch["label"])
    found = ours((1.0, "kto", {"beta": beta, "lam_d": lam_d, "lam_u": lam_u, "kl": kl}, examples))
    assert_same(found, expected)
    assert_same_metrics(trainer, found[2])


@seeds
def test_kto_of_pairs(folders, seed):
    """Both take a pair for two responses, each an example of its own."""
    options = {"reference": True, "batch_size": 10}
    trainer, batch, expected = theirs(KTOTrainer, KTOConfig, folders, preferences(seed), **options)
    assert batch["label"].tolist() == [True] * 5 + [False] * 5
    kl = trainer._metrics["train"]["kl"][-1]
    assert_same(Ours(folders)((1.0, "kto", {"kl": kl}, pairs_of(rows_of(batch)))), expected)


# ------------------------------------------------------------------------ without a reference model


@seeds
@pytest.mark.parametrize("lam", [0.1, 1.0])
def test_orpo(folders, seed, lam):
    """TRL's NLL covers the prompt's tokens after its first as well as the chosen response, and is a
    mean over all of the batch's such tokens; the paper's, and minibnf's, is over the response and a
    mean of means. With N_i = |x_i| - 1 + |y_w,i| and a'_i the mean log-probability of those N_i
    tokens,

        L_TRL = L_orpo + (1/P) Σ a_w,i - Σ N_i a'_i / Σ N_i,

    which here is three kinds of minibnf's losses: orpo, less nll of the chosen responses, plus for
    each pair nll of an example whose prompt is the prompt's first token.
    """
    _, batch, expected = theirs(ORPOTrainer, ORPOConfig, folders, preferences(seed), beta=lam)
    rows = rows_of(batch, "chosen_", "rejected_")
    pairs, chosen = pairs_of(rows), rows[: len(rows) // 2]
    whole = alone([(x[:1], x[1:] + y) for x, y in chosen], [True] * len(chosen))
    N = [len(example.responses[0]) for example in whole]
    terms = [(n / sum(N), "nll", {}, [example]) for n, example in zip(N, whole, strict=True)]
    terms.append((-1.0, "nll", {}, alone(chosen, [True] * len(chosen))))
    assert_same(Ours(folders)((1.0, "orpo", {"lam": lam}, pairs), *terms), expected)


@seeds
@pytest.mark.parametrize("beta, weight", [(0.1, 1.0), (0.3, 0.5), (0.1, 0.0)])
def test_cpo(folders, seed, beta, weight):
    """cpo_alpha weighs an NLL that is a mean over all chosen tokens of the batch: see by_tokens."""
    options = {"beta": beta, "cpo_alpha": weight}
    _, batch, expected = theirs(CPOTrainer, CPOConfig, folders, preferences(seed), **options)
    pairs = pairs_of(rows_of(batch, "chosen_", "rejected_"))
    assert_same(Ours(folders)(*by_tokens(pairs, "cpo", weight, beta=beta)), expected)


@seeds
@pytest.mark.parametrize("beta, gamma", [(2.0, 1.0), (0.1, 0.5), (10.0, 3.0)])
def test_simpo(folders, seed, beta, gamma):
    """The same function once cpo_alpha, the weight of an NLL that SimPO has not, is 0 instead of
    its default 1."""
    options = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": beta, "simpo_gamma": gamma}
    _, batch, expected = theirs(CPOTrainer, CPOConfig, folders, preferences(seed), **options)
    pairs = pairs_of(rows_of(batch, "chosen_", "rejected_"))
    assert_same(Ours(folders)((1.0, "simpo", {"beta": beta, "gamma": gamma}, pairs)), expected)


class Table(torch.nn.Module):
    """A language model of one token of context: the hidden state of a token is its row of a table.
    In float64."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        shape = 3 + len(WORDS), 16
        self.embed = torch.nn.Parameter(torch.randn(shape).double())
        self.unembed = torch.nn.Parameter(torch.randn(shape).double())

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.embed[input_ids] @ self.unembed.T)


@seeds
@pytest.mark.parametrize("name, hyper, options", [
    ("cpo", {"beta": 0.1, "lam": 0.0}, {"beta": 0.1}),
    ("simpo", {"beta": 2.0, "gamma": 1.0}, {"beta": 2.0, "simpo_gamma": 1.0, "loss_type": "simpo"}),
])  # fmt: skip
def test_in_float64(folders, seed, name, hyper, options):
    """CPO's trainer keeps float64 from the logits on (the others go to float32), so there equality
    is to its precision."""
    options = options | {"cpo_alpha": 0.0}
    trainer, batch, _ = theirs(CPOTrainer, CPOConfig, folders, preferences(seed), **options)
    model = Table(seed)
    loss = trainer.compute_loss(model, batch)
    rows = rows_of(batch, "chosen_", "rejected_")
    R, P = len(rows), len(rows) // 2
    hidden = model.embed[torch.tensor([t for x, y in rows for t in (x[-1], *y[:-1])])]
    logps = token_logps(hidden, model.unembed, torch.tensor([t for _, y in rows for t in y]))
    owner = torch.tensor([i for i, (_, y) in enumerate(rows) for _ in y])
    responses = Responses(logps, None, owner, torch.arange(R) < P, torch.arange(R).view(2, P).T)
    ours = LOSSES[name](responses, **hyper)
    assert ours.item() == pytest.approx(loss.item(), rel=1e-13)
    expected, found = (torch.autograd.grad(x, list(model.parameters())) for x in (loss, ours))
    for g, g_theirs in zip(found, expected, strict=True):
        assert (g - g_theirs).norm() <= 1e-13 * g_theirs.norm()


# ------------------------------------------------------------------------- BNF in TRL's DPO trainer


@seeds
def test_bnf_in_trl(folders, seed):
    """One step of BNFTrainer is one step of minibnf's own trainer."""
    options = {"reference": True, "beta": 1.0}
    trainer, batch, expected = theirs(BNFTrainer, DPOConfig, folders, preferences(seed), **options)
    found = Ours(folders)((1.0, "bnf", {}, pairs_of(rows_of(batch))))
    assert_same(found, expected)
    kept = {name: value for name, value in found[2].items() if name in trainer._metrics["train"]}
    assert len(kept) == 4
    assert_same_metrics(trainer, kept)


@pytest.mark.parametrize("seed", [1])
def test_training_with_bnf_in_trl(folders, seed):
    """Three steps of .train(), each of two accumulated batches, with the reference that TRL itself
    loads: plain gradient descent goes the way that minibnf's gradients of the same pairs go, and
    .evaluate() then gives the same loss."""
    rows = preferences(seed, pairs=12)
    options = {"batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
    options |= {"optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.0}
    options |= {"lr_scheduler_type": "constant", "logging_steps": 1}
    trainer = trainer_of(BNFTrainer, DPOConfig, folders, rows, **options)
    pairs = [pair for batch in trainer.get_train_dataloader() for pair in pairs_of(rows_of(batch))]
    trainer.train()
    ours, losses = Ours((folders[0], folders[0])), []
    start = {name: p.detach().clone() for name, p in ours.model.named_parameters()}
    for step in range(3):
        loss, grads, _ = ours((1.0, "bnf", {}, pairs[4 * step : 4 * step + 4]))
        losses.append(loss)
        with torch.no_grad():
            for name, p in ours.model.named_parameters():
                p -= 0.3 * grads[name]
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert logged == pytest.approx(losses, rel=1e-5)
    for name, p in trainer.model.named_parameters():
        moved, expected = p - start[name], ours.model.get_parameter(name) - start[name]
        assert (moved - expected).norm() <= 3e-5 * expected.norm(), name
    after, *_ = ours((1.0, "bnf", {}, pairs))
    evaluated = trainer.evaluate(datasets.Dataset.from_list(rows))
    assert evaluated["eval_loss"] == pytest.approx(after, rel=1e-4)


# --------------------------------------------------------------------- of the weight family and kin


@seeds
@pytest.mark.parametrize("beta", [0.1, 5.0])
@pytest.mark.parametrize("name, loss_type", [("apo_zero", "apo_zero"), ("lndpo", "sigmoid_norm")])
def test_apo_zero_and_lndpo(folders, seed, beta, name, loss_type):
    options = {"loss_type": [loss_type], "beta": beta, "reference": True}
    trainer, batch, expected = theirs(DPOTrainer, DPOConfig, folders, preferences(seed), **options)
    found = Ours(folders)((1.0, name, {"beta": beta}, pairs_of(rows_of(batch))))
    assert_same(found, expected)
    assert_same_metrics(trainer, found[2])


@seeds
def test_power_on_preferred_responses_is_dft(folders, seed):
    """TRL's loss is the mean of -stopgrad(p) log p over the batch's tokens, power's of 1 - p: other
    values, and the same gradients."""
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in preferences(seed)]
    _, batch, expected = theirs(SFTTrainer, SFTConfig, folders, rows, loss_type="dft")
    rows = rows_of(batch)
    found = Ours(folders)((1.0, "power", {"alpha": 1.0}, alone(rows, [True] * len(rows))))
    assert_same((expected[0], found[1]), expected)
