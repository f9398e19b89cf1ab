"""The embedded local model: downloads its weights, runs them in a llama.cpp server, and gives a chat model.

catalogue   the models that can be downloaded: name, hash, size, licence, sources in order
cache       the cache of weights: verifies hashes, resumes downloads, one download at a time
gguf        writes the first blocks of a model file as a smaller file
server      llama.cpp's server on a loopback port, in a child process that ends with this one
pool        shares the server's context memory among requests
loopback    the HTTP transports to the server
chat        a ChatOpenAI whose requests go to the server
"""

from cai_graph.local.cache import EXPORTED, OnProgress, cache_dir, cached, fetch, only_one, stamp, weights
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
    "OnProgress",
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
