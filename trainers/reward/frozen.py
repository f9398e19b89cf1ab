"""Trains only the head of a reward model, on hidden states of the frozen model: feasible on a CPU.

    states    one forward pass per pair, cached on disk, so that an interrupted run resumes
    choose    depth and L2 penalty by cross-validation over prompts
    fit       logistic regression on the difference of two states, with soft labels: the loss of a reward
              model in its last layer only, at its unique optimum
    build     the sequence classifier of that depth with that head

A state is the input of the head in a classifier of a given depth: the hidden state after that many layers,
through the model's final norm, of the last token that is not padding
(https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_layers.py). Chosen and
rejected share their beginning, which is computed once: both are in one row, the second with the positions
that it would have alone, and with the rest of the first masked out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cai_graph.errors import ConfigError, DataError
from trainers import atomic

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    Array = NDArray[Any]

__all__ = ["Choice", "Fit", "build", "choose", "depths", "fit", "folds_of", "states"]

PENALTIES = (30.0, 100.0, 300.0, 1e3, 3e3, 1e4)
"""L2 penalties on the weights of standardised dimensions, tried in turn."""
FOLDS = 5
_CHUNK = 64


class Fit(NamedTuple):
    """A fitted head."""

    weight: Array
    """(hidden,) float64: the reward is its product with a state."""
    loss: float
    """Mean cross-entropy on the pairs that it was fitted to, without the penalty, in nats."""


class Choice(NamedTuple):
    """A depth and a penalty, with their scores on the pairs left out of the fit."""

    depth: int
    """Number of layers."""
    penalty: float
    """L2 penalty."""
    loss: float
    """Mean cross-entropy, in nats."""
    accuracy: float
    """Share of pairs in which the preferred answer has the higher reward."""


def depths(layers: int) -> tuple[int, ...]:
    """Return the depths to try for this many layers: a third, a half, two thirds, five sixths, all.

    >>> depths(30)
    (10, 15, 20, 25, 30)
    """
    return tuple(sorted({max(1, round(layers * sixths / 6)) for sixths in range(2, 7)}))


# --- states -------------------------------------------------------------------------------------------


def states(
    model: PreTrainedModel,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    at: Sequence[int],
    cache: Path,
) -> Array:
    """Return the states of chosen and rejected at some depths, with one forward pass per pair.

    Args:
        model: a sequence classifier over a decoder, in evaluation mode.
        pairs: tokens of chosen and of rejected, prompt included.
        at: depths, in layers.
        cache: folder in which the states are cached, keyed by all they depend on; later runs reuse them.

    Returns:
        (pairs, 2, depths, hidden) float16, chosen before rejected.

    Raises:
        ConfigError: the model is not a decoder of layers with a final norm.
        DataError: a state is not finite; the message names the pair.
    """
    import numpy
    import torch
    from safetensors.numpy import load_file, save_file

    decoder = _decoder(model)
    pad = model.config.get_text_config().pad_token_id
    pairs = [(_unpadded(chosen, pad), _unpadded(rejected, pad)) for chosen, rejected in pairs]
    longest = max(pairs, key=lambda pair: max(map(len, pair)), default=None)
    read = _read_shared if longest is not None and _shares(decoder, longest) else _read_apart
    cache.mkdir(parents=True, exist_ok=True)
    found = []
    mark = _mark(decoder)
    for start in range(0, len(pairs), _CHUNK):
        part = pairs[start : start + _CHUNK]
        path = cache / f"{_key(mark, read.__name__, part, at)}.safetensors"
        if not path.exists():
            with torch.inference_mode():
                rows = [_states(decoder, *read(decoder, *pair), at) for pair in part]
            stacked = numpy.stack(rows)
            if not numpy.isfinite(stacked).all():
                bad = start + int(numpy.argmin(numpy.isfinite(stacked).all(axis=(1, 2, 3))))
                raise DataError(f"pair {bad}: a hidden state is not finite; the weights are broken")
            with atomic.file(path) as work:
                save_file({"states": stacked}, work)
        found.append(load_file(path)["states"])
    return numpy.concatenate(found)


def _unpadded(ids: Sequence[int], pad: int | None) -> Sequence[int]:
    """Return the tokens up to the one whose state the classifier pools.

    If a tokenizer has no padding token of its own, the end-of-text token is used as padding, and is skipped.
    """
    end = len(ids)
    while end > 1 and ids[end - 1] == pad:
        end -= 1
    return ids[:end]


def _decoder(model: Any) -> Any:
    decoder = model.base_model
    if not (hasattr(decoder, "layers") and hasattr(decoder, "norm")):
        raise ConfigError(
            f"{type(decoder).__name__} is no decoder of `layers` with a final `norm`; train all weights of it"
        )
    return decoder


def _states(decoder: Any, hidden: Sequence[torch.Tensor], ends: tuple[int, int], at: Sequence[int]) -> Array:
    """Return (2, depths, hidden): the inputs of the heads of classifiers of these depths.

    Args:
        hidden: (T, hidden) after the embedding and after each layer; the last has passed the norm already.
        ends: index of the last token of chosen and of rejected.
    """
    import torch

    last = len(hidden) - 1
    rows = [hidden[depth][list(ends)] for depth in at]
    normed = [row if depth == last else decoder.norm(row) for depth, row in zip(at, rows, strict=True)]
    found: Array = torch.stack(normed, dim=1).half().cpu().numpy()
    return found


def _read_shared(
    decoder: Any, chosen: Sequence[int], rejected: Sequence[int]
) -> tuple[list[torch.Tensor], tuple[int, int]]:
    """Return the hidden states of a pair whose beginning is computed once, and where its answers end."""
    import torch

    shared = _alike(chosen, rejected)
    ids = torch.tensor([*chosen, *rejected[shared:]], device=decoder.device)
    places = torch.cat([torch.arange(len(chosen)), torch.arange(shared, len(rejected))]).to(decoder.device)
    seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    seen[len(chosen) :, shared : len(chosen)] = False
    mask = torch.zeros(seen.shape, dtype=decoder.dtype).masked_fill(~seen, torch.finfo(decoder.dtype).min)
    hidden = decoder(
        input_ids=ids[None],
        position_ids=places[None],
        attention_mask=mask[None, None].to(decoder.device),
        use_cache=False,
        output_hidden_states=True,
    ).hidden_states
    return [one[0] for one in hidden], (len(chosen) - 1, len(ids) - 1)


def _read_apart(
    decoder: Any, chosen: Sequence[int], rejected: Sequence[int]
) -> tuple[list[torch.Tensor], tuple[int, int]]:
    """Return the same as `_read_shared`, computed in two passes."""
    import torch

    both = [
        decoder(
            input_ids=torch.tensor(ids, device=decoder.device)[None],
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states
        for ids in (chosen, rejected)
    ]
    ends = (len(chosen) - 1, len(chosen) + len(rejected) - 1)
    return [torch.cat([one[0], other[0]]) for one, other in zip(*both, strict=True)], ends


def _shares(decoder: Any, pair: tuple[Sequence[int], Sequence[int]]) -> bool:
    """Return whether the decoder respects a custom mask and positions; some ignore them.

    A decoder with a sliding window does as long as the pair fits into the window, so test the longest pair.
    """
    import torch

    with torch.inference_mode():
        try:
            together, ends = _read_shared(decoder, *pair)
        except (RuntimeError, TypeError, ValueError):
            return False
        apart, alone = _read_apart(decoder, *pair)
    one, other = together[-1][list(ends)].float(), apart[-1][list(alone)].float()
    # bf16 has 8 bits of precision, and rounds differently when sums are taken in another order.
    return bool((one - other).norm() <= 0.05 * other.norm())


def _alike(chosen: Sequence[int], rejected: Sequence[int]) -> int:
    """Return the number of tokens that both begin with; the last token of each is never counted."""
    count = 0
    for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if one != other:
            break
        count += 1
    return count


def _mark(decoder: Any) -> bytes:
    """Return a digest of the weights, which is part of the key of cached states."""
    digest = hashlib.sha256(str(decoder.dtype).encode())
    for name, tensor in sorted(decoder.state_dict().items()):
        # Two moments distinguish weights that differ by training; hashing the bytes would take long.
        told = tensor.double()
        digest.update(
            f"{name} {tuple(tensor.shape)} {told.sum().item()} {told.square().sum().item()}".encode()
        )
    return digest.digest()


def _key(
    mark: bytes, read: str, part: Sequence[tuple[Sequence[int], Sequence[int]]], at: Sequence[int]
) -> str:
    content = json.dumps([read, [[list(chosen), list(rejected)] for chosen, rejected in part], list(at)])
    return hashlib.sha256(mark + content.encode()).hexdigest()[:32]


# --- the fit ------------------------------------------------------------------------------------------


def fit(margins: Array, p_chosen: Array, weights: Array, penalty: float) -> Fit:
    """Return the head of minimal loss, sum of w(-p log s(d) - (1 - p) log s(-d)) + penalty/2 ||v||^2.

    Args:
        margins: (pairs, hidden): state of chosen minus state of rejected.
        p_chosen: (pairs,) in [0, 1].
        weights: (pairs,) above 0.
        penalty: above 0, on v, the weights after each dimension is scaled to a mean square of 1.
    """
    import numpy
    from sklearn.linear_model import LogisticRegression

    scale = numpy.sqrt(numpy.average(margins.astype(float) ** 2, axis=0, weights=weights)) + 1e-9
    x = margins / scale
    # Each pair appears twice: as it is with weight p, and swapped with weight 1 - p.
    model = LogisticRegression(C=1 / penalty, fit_intercept=False, max_iter=1000)
    model.fit(
        numpy.concatenate([x, x]),
        numpy.repeat([1, 0], len(x)),
        sample_weight=numpy.concatenate([weights * p_chosen, weights * (1 - p_chosen)]),
    )
    weight = model.coef_[0] / scale
    return Fit(weight, _loss(margins @ weight, p_chosen, weights))


def folds_of(prompts: Sequence[bytes]) -> Array:
    """Return the fold of each pair, (pairs,) int: all pairs of a prompt are in the same fold.

    Args:
        prompts: an identifier of each pair's prompt.

    Raises:
        DataError: all pairs have the same prompt.
    """
    import numpy

    # In pseudo-random order, with about equally many prompts in each fold.
    drawn = sorted(set(prompts), key=lambda key: hashlib.sha256(key).digest())
    if len(drawn) < 2:
        raise DataError("all pairs are of one prompt; a head is chosen on pairs of other prompts: add some")
    fold = {key: place % FOLDS for place, key in enumerate(drawn)}
    return numpy.array([fold[key] for key in prompts])


def choose(
    found: Array,
    at: Sequence[int],
    p_chosen: Array,
    weights: Array,
    folds: Array,
) -> tuple[Choice, ...]:
    """Return every depth and penalty with its loss on the pairs left out, sorted from best to worst.

    Args:
        found: the result of `states` for the pairs.
        at: its depths.
        p_chosen: (pairs,) in [0, 1].
        weights: (pairs,) above 0.
        folds: (pairs,), as `folds_of` returns them.
    """
    import numpy

    sides = numpy.where(p_chosen >= 0.5, 1, -1)
    tried = []
    for place, depth in enumerate(at):
        margins = found[:, 0, place].astype(float) - found[:, 1, place].astype(float)
        for penalty in PENALTIES:
            told = numpy.zeros(len(margins))
            for fold in sorted(set(folds.tolist())):
                out = folds == fold
                told[out] = margins[out] @ fit(margins[~out], p_chosen[~out], weights[~out], penalty).weight
            accuracy = float((told * sides > 0).mean())
            tried.append(Choice(depth, penalty, _loss(told, p_chosen, weights), accuracy))
    return tuple(sorted(tried, key=lambda one: one.loss))


def _loss(told: Array, p_chosen: Array, weights: Array) -> float:
    import numpy

    each = p_chosen * numpy.logaddexp(0, -told) + (1 - p_chosen) * numpy.logaddexp(0, told)
    return float((weights * each).sum() / weights.sum())


# --- the model ----------------------------------------------------------------------------------------


def build(model: PreTrainedModel, depth: int, weight: Array | None = None) -> PreTrainedModel:
    """Cut a classifier to its lowest `depth` layers, and set its head; it is changed in place and returned.

    Raises:
        ConfigError: it has fewer layers, or is not a decoder of layers.
    """
    import torch

    decoder: Any = _decoder(model)
    config: Any = model.config
    if depth > len(decoder.layers):
        raise ConfigError(f"layers is {depth}, and the model has {len(decoder.layers)}")
    decoder.layers = decoder.layers[:depth]
    config.num_hidden_layers = depth
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:depth]
    if weight is not None:
        head: Any = model.score
        with torch.no_grad():
            head.weight.copy_(torch.as_tensor(weight, dtype=head.weight.dtype)[None])
    return model
