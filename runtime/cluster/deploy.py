"""`scail2-rt serve ENGINES --ray ADDRESS`, and the application builders that `config` uses.

The service has one application for the front end and one per engine folder, named by the digest of its manifest. New
engines become a new application; `Ledger` removes the old one when the jobs accepted for it have ended. The same
command with another number of GPUs keeps the running replicas.
"""

import hashlib
import importlib.metadata
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.kernels.wording import counted
from scail2_rt.runtime.cluster.engines_folder import digest_at
from scail2_rt.runtime.cluster.joining import joined, share_of_node
from scail2_rt.runtime.cluster.ledger import APPS, open_ledger
from scail2_rt.runtime.cluster.objects import Objects
from scail2_rt.runtime.serve.launch import SAME, limits_of
from scail2_rt.runtime.serve.settings import Settings, address_of, is_loopback

FRONT = "scail2-rt"  # name of the front end's application
DRAIN_S = 600.0  # time for a replica that is shut down to finish its job
OPEN_S = 1800.0  # time for an application to start
FAILED = ("DEPLOY_FAILED", "UNHEALTHY")


def settings_of(engines: str, options: Mapping[str, Any]) -> Settings:
    """The settings of the service; paths refer to the nodes. Raises InputError for options that a cluster does not
    support."""
    if options["disk_bytes"] is not None:
        raise InputError(
            "--disk-limit does not work with --ray. Use --keep, or set a lifecycle rule in the cluster's storage."
        )
    named = {name: options[name] for name in SAME if name != "gpus_per_video"}
    return Settings(
        engines=Path(engines),
        data=Path(),
        gpus_per_video=options["gpus_per_video"],
        warm=not options["no_warm"],
        limits=limits_of(options),
        **named,
    )


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """What a cluster serves. `settings` without their folders; data and engines: folder or URL; digest: of the engines'
    manifest."""

    settings: Settings
    data: str
    engines: str
    digest: str


def engines_app(served: ClusterSettings, share: Mapping[str, Any], most: int, restart: bool = True) -> Any:
    """The application of one engine folder. Each replica runs one job; their number follows the number of waiting jobs,
    up to `most`. share: resources per replica; restart: replace running replicas even if only `most` differs from
    theirs."""
    from ray import serve

    from scail2_rt.runtime.cluster.replica import ENCODINGS, Replica

    class Engines(Replica):
        @serve.multiplexed(max_num_models_per_replica=ENCODINGS)
        async def encodings(self, prompt: str) -> str:
            return prompt

    made = serve.deployment(
        name="Engines",
        ray_actor_options=dict(share),
        max_ongoing_requests=1,
        graceful_shutdown_timeout_s=DRAIN_S,
        health_check_period_s=5,
        health_check_timeout_s=30,
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": most,
            "target_ongoing_requests": 1,
            "upscale_delay_s": 3,
            "downscale_delay_s": 600,
            "metrics_interval_s": 1,
        },
    )(Engines)
    if not restart:  # Ray Serve replaces replicas of another version, and by default draws a version per deployment
        parts = (importlib.metadata.version("scail2-rt"), served)
        made = made.options(version=hashlib.sha256(repr(parts).encode()).hexdigest()[:24], _internal=True)
    return made.bind(served.settings, served.data, served.engines, served.digest)


def front_app(served: ClusterSettings, copies: int = 1) -> Any:
    """The application that answers HTTP, with `copies` replicas. New jobs use these engines."""
    from ray import serve

    from scail2_rt.runtime.cluster.front import FrontEnd

    made = serve.deployment(
        name="FrontEnd",
        num_replicas=copies,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=5,
    )
    return made(serve.ingress()(FrontEnd)).bind(served.settings, served.data, served.digest)


def deploy(engines: str, options: Mapping[str, Any], address: str) -> str:
    """Start the service in the cluster, where it stays after this command, and return its URL. Raises InputError if the
    cluster, the engines or the data cannot be reached or another service runs in the cluster."""
    settings, digest = settings_of(engines, options), digest_at(engines)
    data = options["data"]
    if data is None:
        raise InputError("--ray needs --data. Give a folder that all nodes share, or a URL such as s3://BUCKET/FOLDER.")
    data = data if "://" in data else str(Path(data).resolve())
    engines = engines if "://" in engines else str(Path(engines).resolve())
    with joined(address):
        import ray
        from ray import serve

        share, room = share_of_node(settings.gpus_per_video)
        wanted = room if options["gpus"] == "all" else max(1, int(options["gpus"]) // settings.gpus_per_video)
        settings = replace(settings, on_gpu="num_gpus" in share, port=settings.port or _free_port(settings.host))
        try:
            used = ray.get(open_ledger(data).begin.remote())
        except ray.exceptions.RayActorError as error:
            said = str(error).strip().splitlines()[-1]
            raise InputError(f"The cluster cannot use --data {data} ({said}). Give another folder or URL.") from error
        if used != data:
            raise InputError(
                f"This cluster runs a service with --data {used}. Give this --data, or end it with `serve shutdown`."
            )
        serve.start(http_options={"host": settings.host, "port": settings.port, "location": "HeadOnly"})
        name = f"{APPS}{digest[:12]}"
        there = serve.status().applications
        failed = name in there and there[name].status in FAILED
        served = ClusterSettings(settings, data, engines, digest)
        application = engines_app(served, share, wanted, restart=failed)
        old = [app for app in there if app.startswith(APPS) and app != name]
        _run({name: (application, None)}, wait=not old)
        _run({FRONT: (front_app(served), "/")}, wait=True)
        Objects(data).put("current", digest.encode())  # the ledger may now retire older engines
    most = counted(wanted, "replica")
    hint = "`serve status` shows the state, `serve shutdown` stops it"
    print(f"engines: {digest[:12]}, at most {most}; {hint}", file=sys.stderr)
    return f"http://{address_of(settings.host, settings.port)}"


def _run(apps: Mapping[str, tuple[Any, str | None]], wait: bool) -> None:
    """Give applications to Ray Serve. wait: until they run. Raises Scail2Error with Ray Serve's message for one that
    does not start."""
    from ray import serve

    targets = [serve.RunTarget(app, name=name, route_prefix=prefix) for name, (app, prefix) in apps.items()]
    serve.run_many(targets, wait_for_applications_running=False)
    deadline = time.monotonic() + OPEN_S
    while wait:
        found = serve.status().applications
        states = {name: found[name].status for name in apps if name in found}
        for name, state in states.items():
            if state in FAILED:
                said = " ".join(d.message for d in found[name].deployments.values()) or found[name].message
                serve.delete(name)
                raise Scail2Error(f"The application {name} does not start: {said.strip()[-600:]}")
        if all(state == "RUNNING" for state in states.values()) and len(states) == len(apps):
            return
        if time.monotonic() > deadline:
            raise Scail2Error(f"{', '.join(apps)} did not start in {OPEN_S:g} s. Look at `serve status`.")
        time.sleep(0.1)


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.bind((host if is_loopback(host) else "", 0))
        port: int = listener.getsockname()[1]
        return port
