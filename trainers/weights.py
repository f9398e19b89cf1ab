"""Converts between GGUF files, which the embedded engine runs, and safetensors folders, which can be trained.

path_of(spec)                   the user's own folder or file that a model spec names
resolve(model)                  a folder that transformers loads; a GGUF file is dequantised into the cache
source_of(folder)               the GGUF file that a folder's weights were originally trained from
to_gguf(folder, source, target) the inverse of dequantising: metadata of `source` with tensors of `folder`
export(folder)                  writes model.gguf into a checkpoint, so that `local:FOLDER` serves it
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cai_graph import local
from cai_graph.addresses import without_password
from cai_graph.digests import sha256_of
from cai_graph.errors import ConfigError, DataError, MissingExtra, ModelError
from trainers import atomic

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "Precision",
    "export",
    "is_fetched",
    "is_hub_name",
    "path_of",
    "quietly",
    "resolve",
    "source_of",
    "to_gguf",
]

Precision = Literal["F32", "F16", "Q8_0"]
"""How matrices are stored in a GGUF file: 32, 16 or 8.5 bits per weight. Vectors are always F32."""

SOURCE = "source.json"
"""File in a dequantised folder that names the GGUF file it was made from."""

# In llama.cpp's convert_hf_to_gguf.py, these architectures store their tensors as transformers does, except
# for the order of rows in `_rows_for_rope`. Others differ: gemma, for example, adds 1 to its norms.
_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7}  # general.file_type, by llama.h's llama_ftype


def path_of(spec: str) -> Path | None:
    """Return the path of a folder or file that a model spec (PATH or `local:PATH`) names; it need not exist.

    None for a model of the catalogue, even if a file of that name exists here.
    """
    return None if local.model_of(spec) is not None else Path(local.name_in(spec) or spec).expanduser()


def is_hub_name(spec: str) -> bool:
    """Return whether a spec has the form of a name on the model hub, OWNER/NAME."""
    return spec.count("/") == 1 and not spec.startswith((".", "/", "~"))


def is_fetched(name: str) -> bool:
    """Return whether a hub model is in the local cache; if not, OWNER/NAME may be a folder that is gone."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return False
    try:
        return is_hub_name(name) and isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError:  # not a valid name on the hub
        return False


def resolve(model: str | Path) -> Path:
    """Return a folder with safetensors, tokenizer and chat template for a model.

    A folder is returned as it is. `local`, `local:NAME` and `local:FILE.gguf` are dequantised to float32
    once, into a folder of the cache that is named by the file's SHA-256 and appears complete or not at all; a
    second process waits for the first. Any other name is downloaded from the model hub.

    Raises:
        ConfigError: it is neither a folder, a local model nor a name on the hub, or a folder without weights.
        ModelError: the weights cannot be fetched or dequantised.
        MissingExtra: transformers is not installed.
    """
    spec = str(model)
    if (path := path_of(spec)) is not None and path.is_dir():
        return _loadable(path)
    if (name := local.name_in(spec)) is not None:
        return _dequantised(local.weights(name))
    if spec.lower().endswith(".gguf"):
        return _dequantised(local.weights(spec))
    if is_hub_name(spec):
        return _from_hub(spec)
    raise ConfigError(
        f"{without_password(spec)!r} is no folder with weights; name one, a local model such as "
        "'local:smollm2' or 'local:FILE.gguf', or OWNER/NAME of the model hub"
    )


def source_of(folder: Path) -> Path:
    """Return the GGUF file that a folder's weights were trained from, following the chain of base models.

    Raises:
        ConfigError: the chain ends at no GGUF file, or at one that no longer exists here.
    """
    start, seen = folder, set[Path]()
    while folder.resolve() not in seen:
        seen.add(folder.resolve())
        if (folder / SOURCE).exists():
            return _noted(folder / SOURCE)
        base = _base(folder)
        if base is None:
            break
        path = path_of(base)
        if path is None or path.suffix.lower() == ".gguf":
            name = local.name_in(base)
            return local.weights(base if name is None else name)
        folder = path
        if not folder.exists():
            raise ConfigError(
                f"{start}: was trained from {base}, which is not found from here ({Path.cwd()}); go to where "
                "it was trained, or name the GGUF file of that model (--source)"
            )
    raise ConfigError(
        f"{start}: its weights go back to {folder}, which came from no GGUF file; name the GGUF file of that "
        "model (--source), or convert the folder with llama.cpp's convert_hf_to_gguf.py"
    )


def export(
    folder: Path, *, target: Path | None = None, source: Path | None = None, precision: Precision = "F16"
) -> Path:
    """Write the weights of a checkpoint to a GGUF file that the embedded engine serves; return its path.

    Args:
        folder: safetensors as transformers writes them.
        target: the file; by default model.gguf in the folder, where `local:FOLDER` looks for it.
        source: the GGUF file whose metadata (tokenizer, chat template, shape) is used; by default found by
            `source_of`.
        precision: of the matrices.

    Raises:
        ConfigError: there is no source, or its architecture cannot be written.
        DataError: source and folder do not match.
        ModelError: the file cannot be written; nothing of it is left behind.
    """
    target = target or folder / local.EXPORTED
    to_gguf(_loadable(folder), source or source_of(folder), target, precision)
    return target


def to_gguf(folder: Path, source: Path, target: Path, precision: Precision = "F16") -> None:
    """Write a GGUF file with the metadata of `source` and the tensors of `folder`, atomically.

    Tensors that only the source has and that are not trained (frequencies of RoPE) are copied.

    Raises:
        ConfigError: the source's architecture is not llama (Mistral, SmolLM), qwen2 or qwen3.
        DataError: the source cannot be read, or a tensor is missing in the folder or has another shape.
        ModelError: the file cannot be written.
    """
    gguf = _gguf()
    try:
        reader = gguf.GGUFReader(source)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        architecture = metadata["general.architecture"]
        heads = metadata[f"{architecture}.attention.head_count"]
        kv_heads = metadata.get(f"{architecture}.attention.head_count_kv", heads)
        blocks = metadata[f"{architecture}.block_count"]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise DataError(f"{source}: cannot be read as a GGUF model: {error}") from error
    if architecture not in _ARCHITECTURES:
        raise ConfigError(
            f"{source}: is a {architecture} model, and {', '.join(_ARCHITECTURES)} can be written; convert "
            "the folder with llama.cpp's convert_hf_to_gguf.py"
        )
    with _whole_file(target) as work, _tensors(folder) as (names, tensor), ExitStack() as stack:
        ours = _names(architecture, blocks, names)
        writer = stack.enter_context(closing(gguf.GGUFWriter(work, architecture)))
        for key, field in reader.fields.items():
            if key.startswith("GGUF.") or key == "general.architecture":
                continue
            value = _FILE_TYPES[precision] if key == "general.file_type" else metadata[key]
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, value, field.types[0], sub_type=inner)
        plan: list[tuple[Any, str | None]] = []
        for one in reader.tensors:
            name = ours.get(one.name)
            if name is None and not one.name.startswith("rope_"):
                raise DataError(f"{folder}: has no tensor for {one.name!r} of {source.name}")
            plan.append((one, name))
            kind = one.tensor_type if name is None else _kind(one, precision)
            writer.add_tensor_info(one.name, *_layout(one, name, kind), raw_dtype=kind)
        spare = set(ours) - {one.name for one in reader.tensors}
        if spare:
            raise DataError(
                f"{folder}: has {ours[min(spare)]!r}, for which {source.name} has no place; was an output "
                "matrix untied from the embedding in training?"
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for one, name in plan:
            if name is None:
                writer.write_tensor_data(one.data)
                continue
            values = tensor(name)
            wanted = tuple(int(size) for size in reversed(one.shape))
            if values.shape != wanted:
                hint = (
                    "; were tokens added in training?"
                    if one.name.startswith(("token_embd", "output"))
                    else ""
                )
                raise DataError(f"{folder}: {name!r} has shape {values.shape}, {source.name} {wanted}{hint}")
            if architecture == "llama" and ".attn_q." in one.name:
                values = _rows_for_rope(values, heads)
            if architecture == "llama" and ".attn_k." in one.name:
                values = _rows_for_rope(values, kv_heads)
            writer.write_tensor_data(gguf.quants.quantize(values, _kind(one, precision)))


# --- from GGUF ----------------------------------------------------------------------------------------


def _dequantised(path: Path) -> Path:
    known = next((model for model in local.CATALOGUE if local.cached(model) == path), None)
    sha256 = known.sha256 if known else sha256_of(path)
    folder = local.cache_dir() / "safetensors" / f"{sha256[:16]}-{path.stem}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with local.only_one(folder):
            if not folder.is_dir():
                _dequantise(path, folder, sha256)
    except OSError as error:
        raise ModelError(
            f"{folder}: {path.name} cannot be dequantised there: {error.strerror or error}; it takes 4 bytes "
            "a weight. Free some space or set CAI_CACHE to another folder"
        ) from error
    return folder


def _dequantise(path: Path, folder: Path, sha256: str) -> None:
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise MissingExtra("weights to train", "transformers", "train") from error
    try:
        with atomic.folder(folder) as work, quietly():
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(path.parent),
                gguf_file=path.name,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
            )
            # transformers still considers the model quantised, and would refuse to save it.
            model.config.__dict__.pop("quantization_config", None)
            model.__dict__.pop("quantization_method", None)
            model.hf_quantizer = None
            model.is_quantized = False
            model.save_pretrained(work)
            AutoTokenizer.from_pretrained(
                str(path.parent), gguf_file=path.name, local_files_only=True, trust_remote_code=False
            ).save_pretrained(work)
            note = {"file": str(path.absolute()), "sha256": sha256}
            (work / SOURCE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(f"{path}: transformers cannot read this GGUF file: {error}") from error


@contextmanager
def quietly() -> Iterator[None]:
    """Suppress transformers' notices (a GGUF file is dequantised, a head is new); errors are still shown."""
    from transformers.utils import logging

    quiet: Any = logging
    before = quiet.get_verbosity()
    quiet.set_verbosity_error()
    try:
        yield
    finally:
        quiet.set_verbosity(before)


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingExtra(f"the model {name!r}", "transformers", "train") from error
    wanted = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    try:
        return _loadable(Path(snapshot_download(name, allow_patterns=wanted)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"{name!r} is no folder here, and the model hub did not give it: {error}; a local model is "
            "written 'local:NAME'"
        ) from error


def _loadable(folder: Path) -> Path:
    for pattern, what in (("config.json", "config.json"), ("*.safetensors", "weights (*.safetensors)")):
        if not any(folder.glob(pattern)):
            raise ConfigError(f"{folder}: has no {what}; name the folder of a whole model")
    return folder


# --- back to the source -------------------------------------------------------------------------------


def _noted(note: Path) -> Path:
    found = json.loads(note.read_text(encoding="utf-8"))
    path = Path(found["file"])
    if path.exists():
        return path
    for model in local.CATALOGUE:
        if model.sha256 == found["sha256"]:
            return local.fetch(model)
    raise ConfigError(f"{note.parent}: was made of {path}, which is not here any more; name it (--source)")


def _base(folder: Path) -> str | None:
    """Return the base model recorded in a checkpoint's manifest; None: there is no manifest."""
    try:
        return str(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["manifest"]["base"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / 'manifest.json'}: cannot be read as a manifest: {error}") from error


# --- to GGUF ------------------------------------------------------------------------------------------


def _rows_for_rope(values: np.ndarray, heads: int) -> np.ndarray:
    """Return a projection with its rows in the order that llama.cpp's rotary embedding expects.

    transformers pairs dimension i of a head with i + d/2; llama.cpp (only in the architecture "llama") pairs
    neighbours: see `LlamaModel.permute` of convert_hf_to_gguf.py.
    """
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _names(architecture: str, blocks: int, names: list[str]) -> dict[str, str]:
    """Return the name of the folder's tensor by its GGUF name."""
    gguf = _gguf()
    known = gguf.get_tensor_name_map(
        next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), blocks
    )
    found: dict[str, str] = {}
    for name in names:
        ours = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if ours is None:
            raise DataError(f"the tensor {name!r} has no name in a GGUF file of architecture {architecture}")
        found[ours] = name
    return found


def _kind(one: Any, precision: Precision) -> Any:
    kinds = _gguf().GGMLQuantizationType
    if len(one.shape) == 1:
        return kinds.F32
    # Q8_0 stores a row in blocks of 32.
    return kinds.F16 if precision == "Q8_0" and one.shape[0] % 32 else kinds[precision]


def _layout(one: Any, name: str | None, kind: Any) -> tuple[tuple[int, ...], Any, int]:
    """Return shape, dtype and number of bytes, as GGUFWriter.add_tensor_info takes them."""
    import numpy as np

    gguf = _gguf()
    if name is None:
        return one.data.shape, one.data.dtype, one.data.nbytes
    shape = tuple(int(size) for size in reversed(one.shape))
    group, size = gguf.GGML_QUANT_SIZES[kind]
    count = int(np.prod(shape))
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        return shape, np.dtype(np.float32 if size == 4 else np.float16), count * size
    return gguf.quants.quant_shape_to_byte_shape(shape, kind), np.dtype(np.uint8), count // group * size


@contextmanager
def _tensors(folder: Path) -> Iterator[tuple[list[str], Callable[[str], np.ndarray]]]:
    """Yield the names of a folder's tensors, and a function that reads one as float32."""
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise MissingExtra("a GGUF file of trained weights", "safetensors", "train") from error
    files: list[Any] = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
    at = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def read(name: str) -> np.ndarray:
        values: np.ndarray = at[name].get_tensor(name).float().numpy()
        return values

    yield sorted(at), read


@contextmanager
def _whole_file(target: Path) -> Iterator[Path]:
    """Yield a work file that is renamed to `target` when the body ends, or removed if it fails."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic.file(target) as work:
            yield work
    except OSError as error:
        raise ModelError(f"{target}: cannot be written: {error.strerror or error}") from error


def _gguf() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise MissingExtra("a GGUF file of trained weights", "gguf", "train") from error
    return gguf
