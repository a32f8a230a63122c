"""The service: `scail2-rt serve`. Read `server` first, then `service`, then `api`.

server      starts the service: data folder, worker processes, uvicorn
api         the HTTP interface: videos, files, models, health, page
service     the operations behind the interface: accept, describe, cancel and delete jobs
store       jobs and files in SQLite
pool        manages the worker processes from the server; worker: the code of one worker process
checking    sends inputs to a separate process that decodes them; check_process: the code of that process
fields, multipart, inputs, remote_files      turn a request into a job's folder
doors       API keys, allowed hosts and origins, limits for slow clients
client      `scail2-rt generate --server`
"""
