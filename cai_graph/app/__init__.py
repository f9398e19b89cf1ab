"""The wrapped app, seen from outside: how it is called, and what its input, output and streams hold.

wrapped   facts about an app: what is bound to it, how its graph is called, whether it waits
shape     where its input and output hold the conversation, the answer and the context
packed    its output as a checkpointer keeps it
placed    a chat model at the place where its caller called it
handlers  which events of a request each kind of callback handler receives
streams   which parts of an answer are released, and when, while the app still writes it
held      a graph's stream, buffered until its answer is judged, then replayed
"""
