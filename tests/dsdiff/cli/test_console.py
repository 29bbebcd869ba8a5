"""Commands on consoles that are closed or cannot show a text, stopped by signals, and with a log that cannot grow."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
START = (
    "import logging, os, sys, time\nfrom dsdiff.cli.console import command, logger, logs\n@command\ndef main(argv):\n"
)


def heed_ctrl_c() -> None:
    """Undo what a shell does to a process in the background, which hands it on: ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(body: str, *arguments: str, **options) -> subprocess.Popen:
    """Start a command whose function has this body."""
    code = START + "".join(f"    {line}\n" for line in body.splitlines()) + "main()"
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": heed_ctrl_c} | options
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, text=True, **pipes)


def test_a_console_that_cannot_show_a_text_gets_it_escaped():
    body = (
        "with logs(False):\n    logger.info('a circle \\N{UNICORN FACE}')\n"
        "    print('beksi\\N{LATIN SMALL LETTER N WITH ACUTE}ski')"
    )
    for encoding in ("cp1252", "ascii", "utf-8"):
        process = start(body, env={"PYTHONIOENCODING": encoding})
        out, err = process.communicate(timeout=60)
        expected = "a circle 🦄\nbeksiński\n" if encoding == "utf-8" else "a circle \\U0001f984\nbeksi\\u0144ski\n"
        assert (process.returncode, out, err) == (0, expected, ""), encoding


def test_a_pipe_without_a_reader_does_not_end_a_run(tmp_path):
    body = (
        "for i in range(3):\n    print('x' * 100000, flush=True)\n    time.sleep(0.05)\n"
        "print('left in the buffer')\nopen(argv[0], 'w').close()"
    )
    process = start(body, str(tmp_path / "done"))
    process.stdout.close()
    assert process.wait(60) == 0 and (tmp_path / "done").exists()
    assert process.stderr.read() == ""


def test_closed_streams_do_not_end_a_run(tmp_path):
    body = "with logs(False):\n    logger.info('a line')\nprint('x')\nsys.stderr.write('y')\nopen(argv[0], 'w').close()"
    process = start(body, str(tmp_path / "done"), preexec_fn=lambda: (os.close(1), os.close(2)))
    assert process.wait(60) == 0 and (tmp_path / "done").read_text() == ""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_signals_end_a_run_in_one_line(tmp_path):
    body = (
        "try:\n    open(argv[0], 'w').close()\n    time.sleep(60)\nexcept KeyboardInterrupt:\n"
        "    raise KeyboardInterrupt('3 pictures drawn')"
    )
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        ready = tmp_path / number.name
        process = start(body, str(ready))
        while not ready.exists():
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (128 + number, "interrupted: 3 pictures drawn\n"), number


# Runs a script that gets Ctrl-C when it imports its Nth module after `dsdiff.cli`; prints a line before.
EARLY = """import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process of a shell ignores it
left, script = int(sys.argv.pop(1)), sys.argv[1]
def count(event, args):
    global left
    if event == "import" and "dsdiff.cli" in sys.modules and left >= 0:
        left -= 1
        if left < 0:
            print("importing", args[0], flush=True)
            os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(count)
sys.argv = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_while_modules_are_imported_is_one_line(tmp_path):
    chance = random.Random(0)
    own = [0, *(chance.randrange(120) for _ in range(4))]  # before the first library of others
    for moment in (*own, *(chance.randrange(120, 900) for _ in range(3))):
        flags = ("--prompt", "a circle", "--ckpt", str(tmp_path / "none.ckpt"))
        command = [sys.executable, "-c", EARLY, str(moment), str(ROOT / "scripts" / "txt2img.py"), *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert done.stdout.startswith("importing "), moment
        if moment not in own and done.stderr.startswith("error: no checkpoint"):
            continue  # numpy swallows one while it imports its own modules
        assert done.stderr == "interrupted\n", (moment, done.stderr[-2000:])
        assert done.returncode in (-signal.SIGINT, 128 + signal.SIGINT), moment


def test_other_errors_of_imports_are_shown():
    code = "import dsdiff.cli\nimport nothing_of_this_name"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 1 and "ModuleNotFoundError" in done.stderr and "Traceback" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_run_under_nohup_goes_on(tmp_path):
    body = "import signal\nos.kill(os.getpid(), signal.SIGHUP)\nopen(argv[0], 'w').close()"
    process = start(body, str(tmp_path / "done"), preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert process.wait(60) == 0 and (tmp_path / "done").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_log_that_cannot_grow_ends_the_run():
    body = (
        "from pathlib import Path\nwith logs(False) as log:\n    log.open(Path('/dev/full'))\n    logger.info('a line')"
    )
    process = start(body)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (2, "error: No space left on device: '/dev/full'\n")
