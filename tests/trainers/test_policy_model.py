"""Policies and reward models: loaded, sampled and scored in batches."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.messages import AIMessage, HumanMessage
from tiny import CHATML, reward_model, rows, tiny_model, turn

from cai_graph.errors import ConfigError, DataError, ModelError
from trainers.distill.sampler import Sampler
from trainers.policy import (
    Messages,
    Policy,
    RewardModel,
    load_policy,
    load_reward,
    prompt_ids,
    sample,
    sample_each,
    score,
)

PROMPTS: list[Messages] = [row["prompt"] for row in rows("prompts", 5)]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return load_policy(tiny_model(tmp_path_factory.mktemp("models") / "policy"), device="cpu")


@pytest.fixture(scope="module")
def rater(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    return load_reward(reward_model(tmp_path_factory.mktemp("models") / "reward"), device="cpu")


def answers(policy: Policy, prompts: list[Messages] = PROMPTS, **settings: Any) -> list[list[int]]:
    settings = {"max_tokens": 12, "seed": 3, "batch_size": 2, **settings}
    return [answer.ids for answer in sample(policy, prompts, **settings)]


def test_the_same_seed_gives_the_same_answers_and_leaves_the_random_state_alone(policy: Policy) -> None:
    before = torch.get_rng_state()
    first = answers(policy)

    assert torch.equal(torch.get_rng_state(), before)
    assert answers(policy) == first
    assert answers(policy, seed=4) != first


def test_an_answer_does_not_depend_on_what_pads_its_batch(policy: Policy) -> None:
    longer: list[Messages] = [[turn("user", "a much longer question than the others, by far?")]]
    alone = answers(policy, temperature=0, batch_size=1)

    assert answers(policy, PROMPTS + longer, temperature=0, batch_size=6)[:5] == alone


def test_an_answer_ends_with_the_token_that_ends_it_or_says_that_it_did_not(policy: Policy) -> None:
    drawn = sample(policy, PROMPTS * 40, max_tokens=60, seed=0, batch_size=200)
    ended = [answer for answer in drawn if answer.ended]

    assert 0 < len(ended) < len(drawn)
    assert all(answer.ids[-1] in policy.stops for answer in ended)
    assert all(not set(answer.ids[:-1]) & set(policy.stops) for answer in drawn)
    assert all(len(answer.ids) == 60 for answer in drawn if not answer.ended)
    assert all("<|im_end|>" not in answer.text for answer in drawn)


def test_what_the_generation_config_says_of_sampling_does_not_count(policy: Policy) -> None:
    plain = answers(policy, max_tokens=30)
    own = policy.model.generation_config
    try:
        own.top_k, own.repetition_penalty, own.suppress_tokens = 1, 5.0, list(range(3, 200))
        biased = answers(policy, max_tokens=30)

        assert own.top_k == 1
    finally:
        own.top_k, own.repetition_penalty, own.suppress_tokens = 50, 1.0, None

    assert biased == plain


def test_a_prompt_that_leaves_no_room_is_named(policy: Policy) -> None:
    room = policy.model.config.max_position_embeddings
    with pytest.raises(DataError, match=f"the model reads {room:,}"):
        answers(policy, max_tokens=room)


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """A model that reads 80 tokens."""
    folder = tiny_model(tmp_path / "short")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 80}))
    return folder


def test_a_prompt_that_leaves_no_room_fails_alone(short: Path) -> None:
    policy = load_policy(short, device="cpu")
    prompts = [*PROMPTS[:2], [turn("user", "x" * 80)], *PROMPTS[2:]]
    settings: dict[str, Any] = {"max_tokens": 4, "temperature": 0.0, "seed": 0, "batch_size": 4}

    one, two, failed, *others = sample_each(policy, prompts, **settings)

    assert [one, two, *others] == sample(policy, PROMPTS, **settings)
    assert isinstance(failed, DataError)


async def test_of_a_batch_of_requests_one_that_leaves_no_room_fails_alone(short: Path) -> None:
    sampler = Sampler(path=short, max_tokens=4)
    asked = [HumanMessage(text) for text in ("a?", "x" * 80, "b?")]

    one, failed, other = await asyncio.gather(
        *map(sampler.ainvoke, [[m] for m in asked]), return_exceptions=True
    )

    assert isinstance(one, AIMessage)
    assert isinstance(other, AIMessage)
    assert isinstance(failed, DataError)
    with pytest.raises(DataError, match="the model reads 80"):
        sampler.invoke([asked[1]])


def test_a_conversation_that_the_template_refuses_is_named(policy: Policy) -> None:
    tokenizer = policy.tokenizer
    own = tokenizer.chat_template
    tokenizer.chat_template = "{{ raise_exception('system comes first') }}"
    try:
        with pytest.raises(DataError, match="no conversation of user, system: system comes first"):
            prompt_ids(tokenizer, [turn("user", "a"), turn("system", "b")])
    finally:
        tokenizer.chat_template = own


def test_fields_that_arrow_filled_with_none_are_no_part_of_a_prompt(policy: Policy) -> None:
    message = turn("user", "a")

    assert prompt_ids(policy.tokenizer, [{**message, "tool_calls": None, "name": None}]) == prompt_ids(
        policy.tokenizer, [message]
    )


def test_scores_are_in_the_order_of_the_answers_whatever_the_batch(rater: RewardModel) -> None:
    texts = ["yes", "a rather longer answer than that", "", "no", "perhaps"]
    alone = [score(rater, [p], [a], batch_size=1)[0] for p, a in zip(PROMPTS, texts, strict=True)]

    assert score(rater, PROMPTS, texts, batch_size=3) == pytest.approx(alone, abs=1e-5)
    assert len(set(alone)) == len(alone)


def test_a_tokenizers_own_padding_stands_for_what_the_config_leaves_open_though_its_id_is_0(
    tmp_path: Path,
) -> None:
    """Or else the token that ends an answer would pad, and the answer be scored before its end."""
    folder = reward_model(tmp_path / "reward")
    ends = CHATML.replace("<|im_end|>\n{% endfor %}", "<|im_end|>{% endfor %}")
    (folder / "chat_template.jinja").write_text(ends)
    config = json.loads((folder / "config.json").read_text())
    assert config["pad_token_id"] == 0
    named = score(load_reward(folder, device="cpu"), PROMPTS, ["yes"] * 5, batch_size=5)
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))

    left_open = score(load_reward(folder, device="cpu"), PROMPTS, ["yes"] * 5, batch_size=5)

    assert left_open == named


def test_a_reward_model_reads_the_whole_conversation_with_the_answer_at_its_end(rater: RewardModel) -> None:
    conversation = [*PROMPTS[0], turn("assistant", "yes")]
    ids = torch.tensor([rater.tokenizer.apply_chat_template(conversation, return_dict=False)])
    with torch.no_grad():
        expected = float(rater.model(input_ids=ids).logits)

    assert score(rater, PROMPTS[:1], ["yes"], batch_size=1) == pytest.approx([expected], abs=1e-6)


def test_a_text_beyond_what_a_reward_model_reads_loses_its_beginning(rater: RewardModel) -> None:
    config = rater.model.config
    room, config.max_position_embeddings = config.max_position_embeddings, 18
    try:
        scores = [score(rater, [[turn("user", word * 40)]], ["yes"], batch_size=1) for word in "ab"]
    finally:
        config.max_position_embeddings = room

    assert scores[0] == scores[1]


@pytest.mark.parametrize("missing", ["tokenizer", "weights", "template", "folder"])
def test_a_folder_that_is_no_whole_model_is_named(missing: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", template=None if missing == "template" else CHATML)
    match missing:
        case "tokenizer":
            (folder / "tokenizer.json").unlink()
        case "weights":
            (folder / "model.safetensors").unlink()
        case "folder":
            shutil.rmtree(folder)
    with pytest.raises((ConfigError, ModelError), match=f"model'?:? .*(no|without).* {missing}"):
        load_policy(folder, device="cpu")


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a Qwen2ForCausalLM, not a reward model"):
        load_reward(tiny_model(tmp_path / "model"), device="cpu")


def test_four_bits_without_bitsandbytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="4 bits need bitsandbytes; pip install bitsandbytes"):
        load_policy(tmp_path, device="cpu", quantized=True)
