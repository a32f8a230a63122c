"""Batches and the service on a Ray cluster of several machines. Ray starts, monitors, places and scales processes; this
package defines jobs, decides which process may end a job, and stores files.

joining     connects to a cluster; computes the resources of one session
batch       `generate --batch FILE --ray ADDRESS`
deploy      `serve ENGINES --ray ADDRESS`: the Ray Serve applications
config      builders of the same applications for Ray Serve config files
front       a front end: the interface of `runtime.serve`, with rows from the ledger
remote_store   the store of a front end: rows from the ledger, files from the cluster's object store
ledger      the single actor that owns all jobs: records, claims, progress messages
replica     a worker process with open engines, one job at a time
objects     the object store that all nodes reach, by fsspec; engines_folder: the engine folder on a node
"""
