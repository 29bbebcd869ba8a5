"""Puts the configs, which lie outside of the packages, into the wheel; all else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CONFIGS = ("stable-diffusion/v1-inference.yaml", "stable-diffusion/cali_prompts.txt", "shapes/txt2img.yaml")


class BuildWithConfigs(build_py):
    """Copies configs/ to dsdiff/configs of what is built, where `dsdiff.models.registry` looks for them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the checkout's own are used
            return
        for name in CONFIGS:
            target = Path(self.build_lib, "dsdiff", "configs", name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path("configs", name), target)


setup(cmdclass={"build_py": BuildWithConfigs})
