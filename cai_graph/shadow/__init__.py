"""Mode `shadow`: an answer leaves as it is, and is judged behind it.

shadow     the judging, on the bridge's loop, within its bounds
overheard  a run of an app whose answer is handed over to be judged
"""
