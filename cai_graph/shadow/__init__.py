"""Shadow mode: returns the app's answer unchanged and at once, and judges it afterwards in the background.

shadow     queues answers and judges them on the bridge's loop, within limits
overheard  runs the app, records its answer and passes it to the queue
"""
