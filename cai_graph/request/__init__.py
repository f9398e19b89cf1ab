"""What one request goes by, from the settings of its app to the record of its answer.

    policy      the settings, which answer leaves, and what follows a failure
    plan        what serves every request of a wrapped app: critic, reviser, constitution, log
    request     one request, and the run that it becomes
    form        what a revision of a structured answer must be
    drafts      what is recorded of the app's own run
    revision    one candidate revision, and why it is rejected before anybody judges it
    remarks     what a writer puts around a revision, or in place of one
    committing  how long an answer waits for the log, and the alarm where a record is lost

`cai_graph.graph` takes a request through these, and `cai_graph.run` is the one way in.
"""
