"""Concurrency helpers: an event loop for synchronous callers, threads for blocking calls, task groups.

    connections  lets a model's HTTP client be used from any event loop
    bridge       runs the core on one shared event loop for all synchronous callers
    threads      runs blocking calls in threads: a model without async methods, a synchronous handler
    together     runs many coroutines at once, and cancels those that are no longer needed
    context      sets or clears the configuration that LangChain and LangGraph keep in a context variable

Nothing here depends on what is judged.
"""
