"""The wrapped app, seen from outside: how it is called, what it is given, what it says and streams.

wrapped   what is known of an app: what is bound to it, how its graph is called
shape     where its input and output hold the conversation, the answer and the context
packed    its output as a checkpointer keeps it
placed    a chat model at the place where its caller called it
handlers  the callback handlers around a request, and what each kind of them is told
streams   what of an answer leaves when, while the app still writes it
held      a graph's stream, held until its answer is judged
"""
