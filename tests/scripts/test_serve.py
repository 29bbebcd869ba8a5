"""scripts/serve.py as a process: its signals, and what it refuses."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from scripts import serve

ROOT = Path(__file__).resolve().parents[2]
LONG = {"prompt": "x", "steps": 150, "width": 256, "height": 256, "cfg_scale": 4}


def test_what_cannot_be_is_told_before_the_model_is_read(capsys, monkeypatch):
    pytest.importorskip("fastapi")
    monkeypatch.delenv(serve.TOKEN, raising=False)
    busy = socket.create_server(("127.0.0.1", 0))
    port = busy.getsockname()[1]
    for argv, words in (
        (["--port", str(port)], f"cannot listen on 127.0.0.1, port {port}: Address already in use"),
        (["--host", "0.0.0.0"], "give a --token"),
        (["--token", "short"], "8 ASCII characters"),
        (["--model_dir", "nowhere"], "No such directory: 'nowhere'"),
        (["--ckpt", "nowhere"], "nowhere"),
        (["--weight_bit", "4"], "add --ptq"),
    ):
        with pytest.raises(SystemExit) as exit:
            serve.main(["--no_page", *argv])
        assert exit.value.code == 2 and words in capsys.readouterr().err, argv
    busy.close()


def test_without_the_extra_it_tells_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr(serve, "PACKAGES", ("fastapi_that_is_not_there",))
    with pytest.raises(SystemExit) as exit:
        serve.main(["--no_page"])
    line = capsys.readouterr().err
    assert exit.value.code == 2 and 'pip install ".[web]"' in line and line.count("\n") == 1


@pytest.mark.slow
def test_signals_end_the_picture_at_hand(tmp_path):
    pytest.importorskip("fastapi")
    started = {stop: _start(tmp_path / stop.name) for stop in (signal.SIGTERM, signal.SIGINT)}
    for stop, process in started.items():
        port = next(found[1] for line in process.stdout if (found := re.match(r"http://127.0.0.1:(\d+)", line)))
        url, replies = f"http://127.0.0.1:{port}/sdapi/v1", []
        asking = threading.Thread(target=lambda url=url, replies=replies: replies.append(_post(f"{url}/txt2img", LONG)))
        asking.start()
        while not json.load(urllib.request.urlopen(f"{url}/progress"))["state"]["sampling_step"]:
            assert asking.is_alive()
            time.sleep(0.05)
        process.send_signal(stop)
        _, error = process.communicate(timeout=60)
        asking.join()
        assert process.returncode == 128 + stop and error.strip() == "interrupted"
        assert replies == [(503, "the server is being stopped")]
        assert list((tmp_path / stop.name).iterdir()) == []


def _start(outdir):
    flags = ["--no_page", "--port", "0", "--outdir", outdir, "--config", "configs/shapes/txt2img.yaml"]
    return subprocess.Popen(
        [sys.executable, "scripts/serve.py", *flags, "--device", "cpu"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, ""
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["detail"]
