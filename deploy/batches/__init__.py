"""Files and batches of the HTTP API, kept in a directory that all replicas share.

HTTP replicas add files and batch orders; one runner works the orders off. They talk through the directory alone, so each may be
restarted at any time: the runner finds in the result files what is done already.
"""
