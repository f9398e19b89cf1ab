"""The checkpointer threads of a wrapped graph: drafts in them are replaced by the released answers.

memory   reads and updates a thread
turns    lets one request at a time use a thread
unheard  finds drafts in a thread that were never returned to a caller
kept     what a wrapped graph keeps of a request
"""
