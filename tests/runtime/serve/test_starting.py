"""The start of a service: what it says meanwhile, and where it listens."""

import asyncio
import json
import socket
import urllib.request
from pathlib import Path

import pytest

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.serve import starting
from scail2_rt.runtime.serve.server import _listen
from scail2_rt.runtime.serve.settings import Settings, address_of
from tests.support.served import serving

pytest_plugins = ["tests.support.runtime_fixtures"]


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as listener:
            listener.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["[::1]"])
def test_an_ipv6_address_as_in_a_url(engines: Path, cache: Path, tmp_path: Path, host: str) -> None:
    with serving(engines, tmp_path / "data", cache, "--host", host, "--no-warm") as service:
        assert service.url.startswith("http://[::1]:")
        with urllib.request.urlopen(f"{service.url}/health", timeout=60) as answer:
            assert answer.status == 200
    assert address_of("127.0.0.1", 8000) == "127.0.0.1:8000"


def test_a_long_start_says_how_long_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(starting, "FIRST_S", 0.0)
    engines = tmp_path / "e"

    async def start() -> str:
        async with starting.progress_lines(tmp_path, engines):
            said = ""
            while "starting: " not in said:
                await asyncio.sleep(0.01)
                said += capsys.readouterr().err
        return said

    assert "left" not in asyncio.run(start())
    (tmp_path / starting.STARTS).write_text(json.dumps({str(engines): 3600}))
    assert ", about 3600 s left" in asyncio.run(start())
    assert json.loads((tmp_path / starting.STARTS).read_text())[str(engines)] < 3600


def test_two_services_that_start_on_one_port(tmp_path: Path) -> None:
    """The second is refused before it loads engines, also while the first has not begun to serve."""
    first = _listen(Settings(tmp_path, tmp_path / "data", port=0))
    with first, pytest.raises(InputError, match="cannot listen on"):
        _listen(Settings(tmp_path, tmp_path / "other", port=first.getsockname()[1]))
