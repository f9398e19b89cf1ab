"""What an app looks like once it is wrapped: the same calls, types and streams, with judged answers.

    guard     what every face stands on: one app under one plan
    runnable  the face for chains and graphs
    chat      the face for chat models
    shadowed  the face for chat models in mode `shadow`
    typed     structured output of a wrapped chat model
    usage     what the calls of a request cost in tokens

Two more stand beside this package: `cai_graph.middleware` for LangChain agents, and `cai_graph.classic`.
"""
