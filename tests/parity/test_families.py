"""Every family of config.py against transformers: 20 random tiny models each, made and saved by it.

Logits, padded and packed; greedy generation with the cache, token for token; what minibnf saves,
loaded by transformers; the gradient of BNF in every parameter against autograd through
transformers' logits; and every field of config.json, changed: an error that names it, or the same
change of the logits, with fields that transformers' class does not have but its code looks up.
"""

import json
import random
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="the parity extra is not installed: make parity"
)

from minibnf.data import Example, pack, pair  # noqa: E402
from minibnf.files.config import READS, SHAPE, ignored_fields, parse_config  # noqa: E402
from minibnf.generate import generate  # noqa: E402
from minibnf.losses import LOSSES  # noqa: E402
from minibnf.model import load, save  # noqa: E402
from minibnf.responses import Responses  # noqa: E402
from minibnf.step import batch_loss  # noqa: E402
from tests.parity.conftest import REAL, ROWS, promised  # noqa: E402

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
UPPER = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
FAMILIES = {
    "Llama 2": lambda rng: {"attention_bias": rng.random() < 0.3, "mlp_bias": rng.random() < 0.3},
    "Llama 3": lambda rng: {"rope_parameters": LLAMA3 | {"factor": rng.choice([2.0, 8.0])}},
    "Mistral": lambda rng: {"sliding_window": rng.choice([None, 3, 5, 50])},
    "Qwen2, 2.5": lambda rng: rng.choice([{}, UPPER]),
    "Qwen3": lambda rng: {"attention_bias": rng.random() < 0.3} | rng.choice([{}, UPPER]),
    "SmolLM3": lambda rng: {"no_rope_layer_interval": rng.choice([2, 3, 4])}
                           | rng.choice([{}, UPPER]),
    "Gemma-2": lambda rng: {"sliding_window": rng.choice([3, 6, 50]),
                            "query_pre_attn_scalar": rng.choice([4, 9, 32]),
                            "attn_logit_softcapping": rng.choice([None, 2.0, 50.0]),
                            "final_logit_softcapping": rng.choice([None, 3.0, 30.0])},
    "Gemma-3": lambda rng: {"sliding_window": rng.choice([3, 6, 50]),
                            "layer_types": rng.choice([SLIDING, None]),
                            "query_pre_attn_scalar": rng.choice([4, 16])},
}  # fmt: skip
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3",
           "smollm3": "SmolLM3", "gemma2": "Gemma2", "gemma3_text": "Gemma3"}  # fmt: skip
SEEDS, PROMPTS, NEW = 20, 2, 9


def config_of(family: str, seed: int, **fixed):
    """A random config of transformers, but for what is fixed; even seeds tie the embeddings."""
    rng = random.Random(f"{family} {seed}")
    kv = rng.choice([1, 2, 3])
    heads = kv * rng.choice([1, 2, 3])
    name = CLASSES[ROWS[family][0]].replace("Gemma3", "Gemma3Text")
    fields = dict(
        vocab_size=61, hidden_size=heads * -(-rng.choice([16, 33]) // heads),
        intermediate_size=rng.choice([20, 33]), num_hidden_layers=3, num_attention_heads=heads,
        num_key_value_heads=kv, head_dim=rng.choice([4, 6, 10]), max_position_embeddings=64,
        tie_word_embeddings=seed % 2 == 0, initializer_range=0.2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return getattr(transformers, f"{name}Config")(**fields | FAMILIES[family](rng) | fixed)


def model_of(config, seed: int):
    """The model of transformers that a config names, with random weights."""
    torch.manual_seed(seed)
    kind = getattr(transformers, f"{CLASSES[config.model_type]}ForCausalLM")
    model = kind._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():  # norms and biases too, which would be 1 and 0
            if p.dim() == 1:
                p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_model_of_each_family(tmp_path, measured, family, seed):
    theirs = model_of(config_of(family, seed), seed)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="3KB" if seed % 4 < 2 else "1GB")
    assert (tmp_path / "theirs" / "model.safetensors").is_file() == (seed % 4 >= 2)
    ours = load(tmp_path / "theirs")
    tokens = torch.randint(3, 61, (PROMPTS, 14))
    prompts = tokens[:, :5]
    greedy = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(prompts, **greedy)[:, 5:]
    assert generate(ours, prompts.tolist(), max_new_tokens=NEW, temperature=0) == expected.tolist()

    save(ours, tmp_path / "ours")
    of_theirs = transformers.AutoModelForCausalLM
    again = of_theirs.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    with torch.no_grad():
        expected = theirs(tokens).logits
        logits = float((ours(tokens) - expected).abs().max())
        saved = float((again(tokens).logits - expected).abs().max())
    responses = (9, 10, 11, 2), (9, 12, 2), (13, 14, 15, 16, 2)
    gradients = difference_of_gradients(theirs, ours, (5, 6, 7, 8), responses)
    measured(family, PROMPTS * NEW, logits=logits, saved=saved, gradients=gradients)


def difference_of_gradients(theirs, ours, prompt: tuple, responses: tuple) -> float:
    """How far BNF's gradient is off: the largest relative norm of the difference, over parameters.

    BNF of a pair and an unpaired response that shares its prompt, packed, against single rows
    through transformers' logits.
    """
    examples = [pair(prompt, *responses[:2], 1), Example(prompt, responses[2:], (True,), 2)]
    (batch,) = pack(examples, [0, 1], 1000)

    def logps_of(response):
        row = torch.tensor([[*prompt, *response]])
        logps = theirs(row).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return logps.gather(1, row[0, len(prompt) :, None])[:, 0]

    logps = torch.cat([logps_of(examples[i].responses[k]) for i, k in batch.order])
    ref = logps.detach() + 0.5 * torch.sin(torch.arange(len(logps)))
    ref = ref.clamp(max=-1e-3)
    batch = replace(batch, ref_logps=ref)
    LOSSES["bnf"](Responses(logps, ref, batch.owner, batch.preferred, batch.pairs)).backward()
    hyper = {"length": "shorter"}
    batch_loss(ours, batch, LOSSES["bnf"], hyper, batch.examples, torch.float32)[0].backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    found = {name: p.grad for name, p in ours.named_parameters()}
    assert found.keys() == expected.keys()
    return max(float((found[name] - g).norm() / g.norm()) for name, g in expected.items())


# -------------------------------------------------------------------------- fields of config.json

SCALED = {"rope_theta": 50.0, "factor": 2.0, "original_max_position_embeddings": 8,
          "long_factor": [2.0], "short_factor": [1.0]}  # fmt: skip
UNKNOWN = ["linear", "dynamic", "yarn", "longrope", "proportional", "newest"]
OTHER = {  # other values, for fields whose value is no number or truth value, or that take few
    "layer_types": [["full_attention", "sliding_attention", "sliding_attention"],
                    ["full_attention"] * 3],
    "rope_parameters": [{"rope_type": "default", "rope_theta": 50.0}, LLAMA3,
                        *({"rope_type": kind} | SCALED for kind in UNKNOWN)],
    "rope_scaling": [LLAMA3, {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
                     {"type": "linear", "factor": 2.0}],
    "hidden_act": ["relu", "gelu_new"], "hidden_activation": ["relu", "silu"],
    "sliding_window": [2, 7], "attn_logit_softcapping": [1.5, None],
    "final_logit_softcapping": [1.5, None], "no_rope_layers": [[0, 1, 0]],
    "num_attention_heads": [8], "num_key_value_heads": [1, 4], "head_dim": [8], "hidden_size": [48],
    "_name_or_path": ["elsewhere"], "architectures": [["Other"]], "dtype": ["bfloat16"],
    "eos_token_id": [[7, 9], None], "initializer_range": [0.1],
    "id2label": [{"0": "a", "1": "b"}], "label2id": [{"a": 0, "b": 1}], "model_type": ["gpt2"],
    "problem_type": ["regression"],
    "quantization_config": [{"quant_method": "fp8"}], "transformers_version": ["4.0.0"],
}  # fmt: skip
# fields that count only where others are absent; the first three are transformers 4's, which 5
# reads too
REPLACES = {
    "rope_theta": ["rope_parameters"], "rope_scaling": ["rope_parameters"],
    "rope_local_base_freq": ["rope_parameters"], "sliding_window_pattern": ["layer_types"],
    "_sliding_window_pattern": ["layer_types"], "max_window_layers": ["layer_types"],
    "use_sliding_window": ["layer_types"], "num_hidden_layers": ["layer_types", "no_rope_layers"],
    "no_rope_layer_interval": ["no_rope_layers"],
}  # fmt: skip


def others(field: str, value) -> list:
    """Other values of a field than this one."""
    if field in OTHER:
        return [x for x in OTHER[field] if x != value]
    if isinstance(value, bool) or value is None:
        return [not value]
    which = f"transformers' field {field!r}, {value!r} here: which other values are there?"
    assert isinstance(value, (int, float)), which
    return [value + 1 if isinstance(value, int) else 2 * value + 0.1]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_each_field_of_a_config_counts_as_in_transformers_or_is_refused(tmp_path, family):
    """Whatever transformers' config class holds, changed field by field: an error that names it, or
    the very logits of the changed model, whether they change or not.

    config.py knows every field of the class. A field that a later transformers adds fails here.
    """
    fixed = dict(hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=6)
    base = config_of(family, 0, **fixed, **(UPPER if family == "SmolLM3" else {}))
    kind, base = type(base), json.loads(json.dumps(base.to_dict()))
    old = {} if family == "Llama 3" else {"rope_theta": 1e4, "rope_scaling": None}
    if family == "Gemma-3":
        old["rope_local_base_freq"] = 1e4
    parse_config(base, "as transformers writes it, with every default")
    assert not ignored_fields(base), "a field of the class that config.py does not list"
    tokens, wrong, counted = torch.randint(3, 61, (2, 14)), [], 0
    fields = base | old
    for field, before in fields.items():
        replaced = REPLACES.get(field, [])
        for value in others(field, before):
            raw = {k: v for k, v in base.items() if k not in replaced} | {field: value}
            try:
                parse_config(raw, "changed")
            except ValueError as error:
                names = [field, *replaced]
                if field.startswith("rope_"):
                    names.append("rotary positions")
                if not any(name in str(error) for name in names):
                    wrong.append(f"{field} = {value}: an error that does not name it: {error}")
                continue
            theirs = model_of(kind.from_dict(deepcopy(raw)), 1)  # it changes what it is given
            theirs.save_pretrained(tmp_path)
            (tmp_path / "config.json").write_text(json.dumps(raw))
            # False changes only what object holds the logits, and fails in transformers 5
            theirs.config.return_dict = True
            expected = theirs(tokens).logits
            difference = float((load(tmp_path)(tokens) - expected).abs().max())
            counted += 1
            if difference > 1e-5:
                wrong.append(f"{field} = {value}: logits differ by {difference:.2g}")
    assert not wrong, "\n".join(wrong)
    assert counted >= 20


class Lookups:
    """Within `with`: collects the names of fields that transformers seeks in vain in a config."""

    def __enter__(self):
        self.found, self.plain = set(), transformers.PreTrainedConfig.__getattribute__

        def lookup(config, name):
            try:
                return self.plain(config, name)
            except AttributeError:
                self.found.add(name)
                raise

        transformers.PreTrainedConfig.__getattribute__ = lookup
        return self.found

    def __exit__(self, *_):
        transformers.PreTrainedConfig.__getattribute__ = self.plain


TRIED = [True, False, 2, {"1": {"head_dim": 2}}]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_field_that_transformers_class_lacks_does_nothing_or_is_refused(tmp_path, family):
    """Each name that transformers looks up in vain, given a value: it is refused, or the logits and
    greedy tokens of transformers are those without it, which are ours.

    Left out: fields that are read here, and so are tested above; settings of generate(), which are
    not the model's; transformers' private names; values that make transformers itself fail.
    """
    config = config_of(family, 0, hidden_size=24, num_attention_heads=4, num_key_value_heads=2)
    model_of(config, 1).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    tokens = torch.randint(3, 61, (1, 14), generator=torch.Generator().manual_seed(0))
    greedy = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    @torch.no_grad()
    def computed(fields):
        (tmp_path / "config.json").write_text(json.dumps(raw | fields))
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        return model(tokens).logits, model.generate(tokens, **greedy)

    with Lookups() as sought:
        logits, new = computed({})
    torch.testing.assert_close(load(tmp_path)(tokens), logits, rtol=0, atol=1e-5)
    ours = SHAPE | READS[config.model_type] | vars(transformers.GenerationConfig()).keys()
    wrong, compared = [], 0
    for field in sorted(name for name in sought - ours if not name.startswith("_")):
        for value in TRIED:
            try:
                parse_config(raw | {field: value}, "changed")
            except ValueError as error:
                if field not in str(error):
                    wrong.append(f"{field} = {value}: an error that does not name it: {error}")
                continue
            try:
                changed = computed({field: value})
            except Exception:  # whatever a senseless value makes transformers raise
                continue
            compared += 1
            if (changed[0] - logits).abs().max() > 1e-5 or not changed[1].equal(new):
                wrong.append(f"{field} = {value}: transformers computes something else")
    assert not wrong, "\n".join(wrong)
    assert compared >= 10


def test_the_readme_names_each_family_and_what_was_compared():
    """The figures themselves are held to the page as they are measured."""
    assert {model_type for model_type, _ in ROWS.values()} == set(READS)
    for family, (model_type, what) in ROWS.items():
        models, tokens = (1, 3 * 32) if family == REAL else (SEEDS, SEEDS * PROMPTS * NEW)
        cells = promised(family)
        assert cells[:4] == [family, f"`{model_type}`", what, str(models)]
        assert cells[5] == f"{tokens} of {tokens}"
