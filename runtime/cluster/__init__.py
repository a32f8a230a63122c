"""Past one machine: batches and the service on a Ray cluster. Ray starts, watches, places and scales; ours is what a
job is, who may end it, and where its files lie.

joining     an address → a connected program, and what one session takes of a node
batch       `generate --batch FILE --ray ADDRESS`
"""
