"""Past one machine: batches and the service on a Ray cluster. Ray starts, watches, places and scales; ours is what a
job is, who may end it, and where its files lie.

joining     an address → a connected program, and what one session takes of a node
batch       `generate --batch FILE --ray ADDRESS`
deploy      `serve ENGINES --ray ADDRESS`, on Ray Serve: the applications
config      what a Ray Serve config file names instead: builders of the same applications
front       a front end: the interface of `runtime.serve`, on the ledger's rows
remote_store   the store of a front end: rows from the ledger, files from the cluster's store
ledger      the one actor that knows all jobs: records, claims, who is listened to
replica     warm engines in a worker process, a job at a time
objects     the store that all nodes reach, by fsspec; engines_folder: engines on a node
"""
