"""The objects that wrap an app: they have its calls, types and streams, and their answers are judged.

    guard     the core of every face: one app under one plan
    runnable  the face for chains and graphs
    chat      the face for chat models
    shadowed  the face for chat models in mode `shadow`
    typed     structured output of a wrapped chat model
    usage     the token usage of a request

Two more faces are outside this package: `cai_graph.middleware` for LangChain agents, and `cai_graph.classic`.
"""
