"""Application builders for Ray Serve config files: `scail2_rt.runtime.cluster.config:front` and `…:engines`. The folder
examples/ray has config files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.cluster.deploy import ClusterSettings, engines_app, front_app
from scail2_rt.runtime.cluster.engines_folder import digest_at
from scail2_rt.runtime.cluster.ledger import open_ledger
from scail2_rt.runtime.cluster.objects import Objects
from scail2_rt.runtime.serve.settings import Limits, Settings


def _read(args: Mapping[str, Any], *own: str) -> ClusterSettings:
    """What to serve, from an application's args: fields of `Settings` and `Limits`, and the names in `own`. Raises
    InputError for an unknown or missing argument, and for a path that is no engine folder."""
    names = [name for name in (*Settings.__slots__, *Limits.__slots__, *own) if name != "limits"]
    if unknown := [name for name in args if name not in names]:
        raise InputError(f"{unknown[0]} is not an argument of this application. Use {', '.join(names)}.")
    given = {name: value for name, value in args.items() if name not in ("engines", "data", *own)}
    limits = {name: given.pop(name) for name in Limits.__slots__ if name in given}
    if missing := [name for name in ("engines", "data") if name not in args]:
        raise InputError(f"The application's args lack {missing[0]}. Add it to the config file.")
    for name in ("allow_hosts", "fetch_hosts"):
        given[name] = tuple(given.get(name, ()))
    for name in ("key_file", "segmenter_weights"):
        given[name] = Path(given[name]) if given.get(name) else None
    settings = Settings(engines=Path(args["engines"]), data=Path(), limits=Limits(**limits), **given)
    return ClusterSettings(settings, str(args["data"]), str(args["engines"]), digest_at(str(args["engines"])))


def front(args: dict[str, Any]) -> Any:
    """Build the front end's application. args: settings, limits, engines, data, and copies (number of replicas). New
    jobs use these engines."""
    served = _read(args, "copies")
    open_ledger(served.data)
    Objects(served.data).put("current", served.digest.encode())
    return front_app(served, int(args.get("copies", 1)))


def engines(args: dict[str, Any]) -> Any:
    """Build the application of one engine folder. args: settings, limits, engines, data, and replicas (at most)."""
    served = _read(args, "replicas")
    open_ledger(served.data)
    share = {"num_gpus": served.settings.gpus_per_video, "num_cpus": 1} if served.settings.on_gpu else {"num_cpus": 1}
    return engines_app(served, share, int(args.get("replicas", 1)))
