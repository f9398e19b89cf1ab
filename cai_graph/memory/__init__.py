"""Threads of a wrapped graph's memory: what a judged answer changes in them, and what must not stay there.

memory   a thread, read and changed as its owner does it
turns    one request at a time for each thread
unheard  which words in a thread nobody was given
kept     what a wrapped graph keeps of a request
"""
