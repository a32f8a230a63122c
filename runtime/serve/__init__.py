"""The service: `scail2-rt serve`. Read `server` first, then `service`, then `api`.

server      options → a data folder, the processes, uvicorn
api         the HTTP interface: videos, files, models, health, page
service     what the interface does: take a job, tell about it, end it
store       jobs and files in SQLite
pool        the worker processes, seen from the server; worker: such a process
checking    uploads are decoded in a process of their own; check_process: that process
fields, multipart, inputs, remote_files      from a request to a job's folder
doors       keys, hosts, origins, slow clients
client      `scail2-rt generate --server`
"""
