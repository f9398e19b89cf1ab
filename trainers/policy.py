"""Loads policies and reward models from a folder, samples answers and scores them in batches.

    load_policy, Policy         a language model with its tokenizer; `sample` generates answers
    load_reward, RewardModel    a sequence classifier with its own tokenizer; `score` scores answers

Conversations are lists of messages, as in the dataset's rows. Each model formats them with the chat template
of its own tokenizer, so a policy and its reward model may come from different families.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from cai_graph.errors import ConfigError, DataError, MissingExtra
from trainers.checkpoint import Checkpoint
from trainers.weights import resolve

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Messages",
    "Policy",
    "RewardModel",
    "Sample",
    "batch_of",
    "device_of",
    "four_bits",
    "load_policy",
    "load_reward",
    "prompt_ids",
    "sample",
    "sample_each",
    "score",
    "score_ids",
    "seed_of",
]

Messages = list[dict[str, Any]]
"""A conversation: `{"role": …, "content": …}` in order, as in the dataset's rows."""


@dataclass(frozen=True)
class Policy:
    """A language model that answers conversations."""

    model: PreTrainedModel
    """Causal language model."""
    tokenizer: PreTrainedTokenizerBase
    """Its tokenizer, with a chat template."""

    @property
    def stops(self) -> tuple[int, ...]:
        """Tokens that end an answer: those of the tokenizer, and of the model's generation config."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        found = configured if isinstance(configured, list) else [configured]
        return tuple(sorted({t for t in [*found, self.tokenizer.eos_token_id] if t is not None}))

    @property
    def pad(self) -> int:
        """The padding token of a batch. Its value does not matter: masks mark what is text."""
        pad = self.tokenizer.pad_token_id
        return int(self.stops[0] if pad is None else pad)


@dataclass(frozen=True)
class RewardModel:
    """A sequence classifier with one output: the higher, the better the answer."""

    model: PreTrainedModel
    """Sequence classifier, `num_labels` 1."""
    tokenizer: PreTrainedTokenizerBase
    """Its own tokenizer, with a chat template."""


class Sample(NamedTuple):
    """One answer of a policy."""

    prompt_ids: list[int]
    """Tokens of the conversation, up to where the assistant's answer begins."""
    ids: list[int]
    """Tokens of the answer, including the one that ended it."""
    text: str
    """The answer, without special tokens."""
    ended: bool
    """Whether it ended by itself, and was not cut off at the token limit."""


# --- loading ------------------------------------------------------------------------------------------


def device_of(name: str | None = None) -> torch.device:
    """Return the device of that name; None: the first available accelerator, else the CPU."""
    import torch

    if name is not None:
        return torch.device(name)
    found = torch.accelerator.current_accelerator(check_available=True)
    return found if found is not None else torch.device("cpu")


def load_policy(
    model: str | Path, *, dtype: str = "auto", device: str | None = None, quantized: bool = False
) -> Policy:
    """Load a causal language model and its tokenizer, in evaluation mode.

    Args:
        model: a folder with safetensors and tokenizer, or another name that `trainers.weights.resolve` knows.
        dtype: of the weights, such as "float32"; "auto" is float32 on a CPU and bfloat16 elsewhere.
        device: where it runs; None: the first available accelerator, else the CPU.
        quantized: whether the weights are loaded in 4 bits (Dettmers et al. 2023); needs bitsandbytes.

    Raises:
        ConfigError: it is not a model, or its tokenizer has no chat template or no token that ends an answer.
        ModelError: the folder lacks weights or a tokenizer; the message says which.
        MissingExtra: torch or transformers is not installed.
    """
    settings: dict[str, Any] = {}
    if quantized:
        settings = {"quantization_config": four_bits("bfloat16"), "device_map": {"": device_of(device)}}
    loaded, tokenizer = _load("AutoModelForCausalLM", model, dtype, device, **settings)
    policy = Policy(loaded, tokenizer)
    if not policy.stops:
        raise ConfigError(f"{model}: no token ends an answer; set eos_token in its tokenizer_config.json")
    return policy


def load_reward(model: str | Path, *, dtype: str = "auto", device: str | None = None) -> RewardModel:
    """Load a reward model and its tokenizer, in evaluation mode; arguments and errors as in `load_policy`.

    The `reward_shift` of its config.json, if there is one, is subtracted from every reward.

    Raises:
        ConfigError: it is not a sequence classifier with one output, but for example a language model.
    """
    loaded, tokenizer = _load("AutoModelForSequenceClassification", model, dtype, device, num_labels=1)
    if not any("SequenceClassification" in name for name in loaded.config.architectures or ()):
        raise ConfigError(
            f"{model}: is a {', '.join(loaded.config.architectures or ['model'])}, not a reward model; name "
            "what `cai train reward` wrote"
        )
    if loaded.config.pad_token_id is None:  # without one, the classifier cannot find the end of a text
        pad = tokenizer.pad_token_id
        loaded.config.pad_token_id = tokenizer.eos_token_id if pad is None else pad
    if shift := getattr(loaded.config, "reward_shift", 0.0):
        loaded.register_forward_hook(lambda _model, _inputs, output: _centred(output, shift))
    return RewardModel(loaded, tokenizer)


def _centred(output: Any, shift: float) -> Any:
    """Return a reward model's output with its `reward_shift` subtracted."""
    output.logits = output.logits - shift
    return output


def _load(kind: str, model: str | Path, dtype: str, device: str | None, **settings: Any) -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingExtra("training", error.name or "torch", "train") from error
    folder = resolve(model)
    where = device_of(device)
    if dtype == "auto":
        dtype = "float32" if where.type == "cpu" else "bfloat16"
    Checkpoint.open(folder)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: its tokenizer cannot be read: {error}") from error
    if tokenizer.chat_template is None:
        raise ConfigError(f"{folder}: its tokenizer has no chat template; train from an instruction model")
    try:
        loaded = getattr(transformers, kind).from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            use_safetensors=True,
            **settings,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{folder}: its weights cannot be read: {error}") from error
    if "device_map" not in settings:
        loaded = loaded.to(where)
    return loaded.eval(), tokenizer


def four_bits(computed_in: Literal["bfloat16", "float32"]) -> Any:
    """Return transformers' config for weights in 4 bits (Dettmers et al. 2023).

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            "quantized: 4 bits need bitsandbytes; pip install bitsandbytes, or leave quantized out"
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=computed_in,
    )


# --- sampling -----------------------------------------------------------------------------------------


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Messages) -> list[int]:
    """Return a conversation's tokens, up to where the assistant's answer begins.

    Raises:
        DataError: the chat template rejects the conversation; the message gives the reason.
    """
    return _templated(tokenizer, prompt, add_generation_prompt=True)


def _templated(tokenizer: Any, messages: Messages, *, add_generation_prompt: bool) -> list[int]:
    from jinja2 import TemplateError

    # Arrow gives every message all fields that any message has, with None for absent ones: remove those.
    plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            plain, tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=False
        )
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        # These are the errors of templates on a turn they do not expect, such as one without content.
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise DataError(f"the chat template takes no conversation of {roles}: {error}") from error
    return ids


def batch_of(
    rows: Sequence[Sequence[int]], *, pad: int, left: bool, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of tokens as one padded tensor, and the mask of its text.

    Returns:
        ids: (B, T) int64, T the longest row, padded with `pad` on the left or on the right.
        mask: (B, T) int64, 1 on text.
    """
    import torch

    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, place] = torch.tensor(row, dtype=torch.long)
        mask[number, place] = 1
    return ids.to(device), mask.to(device)


def sample(
    policy: Policy,
    prompts: Sequence[Messages],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int,
    batch_size: int,
    first: int = 0,
    in_step: bool = False,
) -> list[Sample]:
    """Return one answer to each conversation, in order.

    The same seed and batch size give the same answers; the random state of torch is restored.
    Sampling settings of the model's generation config (top-k, penalties) are ignored.

    Args:
        policy: the model that answers.
        prompts: conversations; a prompt that is to be answered twice is listed twice.
        max_tokens: maximum tokens of an answer.
        temperature: above 0; 0 always takes the most probable token.
        top_p: smallest probability mass that tokens are drawn from.
        seed: of the sampling.
        batch_size: answers generated at once.
        first: number of the first batch; other processes sample the batches before it with the same seed.
        in_step: the processes share one sharded model, and all continue until the longest answer is done.

    Raises:
        DataError: a conversation does not fit the chat template, or leaves no room for an answer.
    """
    rows = [_asked(policy, prompt, max_tokens) for prompt in prompts]
    return [
        answer
        for number, start in enumerate(range(0, len(rows), batch_size), first)
        for answer in _sample(
            policy,
            rows[start : start + batch_size],
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed + 1_000_003 * number,
            in_step=in_step,
        )
    ]


def seed_of(seed: int, number: int, purpose: int = 0) -> int:
    """Return the seed of one draw, so that its result does not depend on any earlier draw.

    Args:
        seed: of the run.
        number: of the draw, such as the update that it is for.
        purpose: distinguishes draws of the same number, in [0, 7919).
    """
    return (seed * 1_000_003 + number) * 7_919 + purpose


def sample_each(
    policy: Policy,
    prompts: Sequence[Messages],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
) -> list[Sample | DataError]:
    """Return the results of `sample`, with an error in place of each conversation that cannot be answered."""
    found: list[Sample | DataError | None] = [None] * len(prompts)
    for number, prompt in enumerate(prompts):
        try:
            _asked(policy, prompt, max_tokens)
        except DataError as error:
            found[number] = error
    answers = iter(
        sample(
            policy,
            [prompt for prompt, error in zip(prompts, found, strict=True) if error is None],
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
        )
    )
    return [next(answers) if error is None else error for error in found]


def _asked(policy: Policy, prompt: Messages, max_tokens: int) -> list[int]:
    """Return a conversation's tokens; raise DataError if the policy cannot answer it."""
    ids = prompt_ids(policy.tokenizer, prompt)
    room = getattr(policy.model.config, "max_position_embeddings", None)
    if room is not None and len(ids) + max_tokens > room:
        raise DataError(
            f"a prompt of {len(ids):,} tokens leaves no room for {max_tokens:,} more: the model reads "
            f"{room:,}; leave such prompts out"
        )
    return ids


def _sample(
    policy: Policy,
    rows: list[list[int]],
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    in_step: bool,
) -> list[Sample]:
    import torch
    from transformers import GenerationConfig

    model: Any = policy.model
    ids, mask = batch_of(rows, pad=policy.pad, left=True, device=model.device)
    draw = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    wanted: Any = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_tokens,
        eos_token_id=list(policy.stops),
        pad_token_id=policy.pad,
        **(draw if temperature > 0 else {"do_sample": False}),
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with _plain(model), torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        written = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=wanted, synced_gpus=in_step
        )
    return [
        _answer(policy, row, tokens)
        for row, tokens in zip(rows, written[:, ids.shape[1] :].tolist(), strict=True)
    ]


@contextlib.contextmanager
def _plain(model: Any) -> Iterator[None]:
    """Put a model into evaluation mode, with an empty generation config, while the body runs."""
    from transformers import GenerationConfig

    own, training, cached = model.generation_config, model.training, model.config.use_cache
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    model.config.use_cache = True
    model.eval()
    try:
        yield
    finally:
        model.generation_config, model.config.use_cache = own, cached
        model.train(training)


def _answer(policy: Policy, prompt: list[int], tokens: list[int]) -> Sample:
    end = next((place for place, token in enumerate(tokens) if token in policy.stops), None)
    ids = tokens if end is None else tokens[: end + 1]
    text = policy.tokenizer.decode(ids, skip_special_tokens=True)
    return Sample(prompt, ids, text if isinstance(text, str) else "".join(text), end is not None)


# --- scoring ------------------------------------------------------------------------------------------


def score(
    reward_model: RewardModel, prompts: Sequence[Messages], answers: Sequence[str], *, batch_size: int
) -> list[float]:
    """Return a reward model's score of each answer to its conversation, in order.

    A text that is too long for the model loses its beginning, so that the end of the answer is always seen.

    Raises:
        DataError: a conversation does not fit the chat template.
    """
    model, tokenizer = reward_model.model, reward_model.tokenizer
    room = getattr(model.config, "max_position_embeddings", None)
    rows = [
        _templated(
            tokenizer, [*prompt, {"role": "assistant", "content": answer}], add_generation_prompt=False
        )[-(room or 0) :]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return score_ids(model, rows, pad=model.config.pad_token_id, batch_size=batch_size, device=model.device)


def score_ids(
    model: Any, rows: Sequence[Sequence[int]], *, pad: int, batch_size: int, device: torch.device
) -> list[float]:
    """Return the single output of a sequence classifier for each row of tokens, in order.

    Rows of similar length are batched together, to keep padding small.
    """
    import torch

    scores = [0.0] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    for start in range(0, len(rows), batch_size):
        chosen = by_length[start : start + batch_size]
        ids, mask = batch_of([rows[number] for number in chosen], pad=pad, left=False, device=device)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits
        for number, value in zip(chosen, logits[:, 0].float().tolist(), strict=True):
            scores[number] = value
    return scores
