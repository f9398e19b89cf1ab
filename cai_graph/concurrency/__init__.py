"""Synchronous callers and an async core: the bridge between them, threads for what blocks, work side by side.

    connections  connections of a model's client that any event loop may use
    bridge       one event loop behind every synchronous caller
    threads      threads for what blocks: a model without asynchronous calls, a synchronous handler
    together     work on many things at once, none of which goes on once it is not needed any more
    context      what LangChain and LangGraph carry in the context: set, or set aside

Nothing here knows what is judged.
"""
