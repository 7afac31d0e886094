"""The recipes lie where people read them, at the top of the repository; a wheel carries a copy of them inside the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copies ``recipes/`` into ``daekit/resources/recipes``, except in an editable installation, which reads them in place."""

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "daekit" / "resources" / "recipes"
            shutil.copytree(Path(__file__).parent / "recipes", target, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithRecipes})
