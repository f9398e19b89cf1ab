"""The parts of one request: settings, policies, its state, candidate revisions, and the commit of its record.

    policy      the Settings, which answer is released, and what happens after a failure
    plan        what all requests of a wrapped app share: critic, reviser, constitution, log
    request     one Request, and the Run, its state while the graph works on it
    form        the schema and parser that a revision of a structured answer must satisfy
    drafts      records the model calls of the app's own run
    revision    writes one candidate revision, and rejects it if that needs no critic
    remarks     removes remarks around a revision, and detects a remark in place of one
    committing  how long an answer waits for the log, and the alarm for a lost record

`cai_graph.graph` calls these for a request; `cai_graph.run` is the only entry point.
"""
