"""Running the drawing commands on random weights and tiny pictures, and the one line in which they refuse."""

import pytest

from dsdiff.models.registry import EMBEDDED

# In float32, as bfloat16 would make differences of rounding visible.
TINY = ("--H", "32", "--W", "48", "--device", "cpu", "--vae", "float32")


@pytest.fixture
def run_tiny(random_ckpt, tmp_path):
    """run_tiny(command, *flags, outdir) -> outdir; a prompt is added where there is none. Later flags count."""

    def call(command, *flags, outdir="out"):
        given = [str(flag) for flag in flags]
        prompt = [] if {"--prompt", "--from-file"} & set(given) else ["--prompt", "a red circle"]
        folder = tmp_path / outdir
        files = ["--config", str(EMBEDDED), "--ckpt", str(random_ckpt), "--outdir", str(folder)]
        command.main([*files, *TINY, *prompt, *given])
        return folder

    return call


@pytest.fixture
def refused(run, tmp_path, capsys):
    """refused(*flags) -> the one line on stderr of the module's `run`, which has left nothing behind."""

    def call(*flags, outdir="refused"):
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            run(*flags, outdir=outdir)
        lines = capsys.readouterr().err.splitlines()
        assert exit.value.code == 2
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        assert sorted(tmp_path.rglob("*")) == before
        return lines[0]

    return call
