"""The embedded local model: which weights exist, how they reach this machine, and the engine that runs them.

catalogue   what can be fetched: name, hash, size, licence, sources in order
cache       the user's cache: hash-checked, resumed, one download at a time
gguf        the first blocks of a model file, as a smaller one
server      llama.cpp's server on a loopback port: started on first use, gone with us
pool        the memory that its conversations share
chat        a plain ChatOpenAI in front of it
"""

from cai_graph.local.cache import EXPORTED, Progress, cache_dir, cached, fetch, only_one, stamp, weights
from cai_graph.local.catalogue import (
    CATALOGUE,
    DEFAULT_MODEL,
    HubFile,
    LocalModel,
    WheelPart,
    find,
    model_of,
    name_in,
)
from cai_graph.local.chat import chat_model, is_local, own_weights
from cai_graph.local.gguf import block_count, first_blocks
from cai_graph.local.server import CONTEXT_TOKENS, CONVERSATIONS, Engine, Mode, engine, usable_cores

__all__ = [
    "CATALOGUE",
    "CONTEXT_TOKENS",
    "CONVERSATIONS",
    "DEFAULT_MODEL",
    "EXPORTED",
    "Engine",
    "HubFile",
    "LocalModel",
    "Mode",
    "Progress",
    "WheelPart",
    "block_count",
    "cache_dir",
    "cached",
    "chat_model",
    "engine",
    "fetch",
    "find",
    "first_blocks",
    "is_local",
    "model_of",
    "name_in",
    "only_one",
    "own_weights",
    "stamp",
    "usable_cores",
    "weights",
]
