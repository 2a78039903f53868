"""Puts two start-up files beside the package, so that nnU-Net finds the trainers without an environment variable.

Python runs them when it starts: `nnunet_ssl.start` (Python 3.15 and later, PEP 829), or else the import line of
`nnunet_ssl.pth`.
"""

from pathlib import Path

from setuptools.command.build_py import build_py

STARTUP_FILES = {
    "nnunet_ssl.pth": "import nnunet_ssl.autoregister; nnunet_ssl.autoregister.register()\n",
    "nnunet_ssl.start": "nnunet_ssl.autoregister:register\n",
}


class BuildPyWithStartupFiles(build_py):
    def run(self):
        super().run()
        # An editable wheel takes nothing from build_lib: there the wheel's root is the installation folder.
        root = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        for name, text in STARTUP_FILES.items():
            Path(root, name).write_text(text, encoding="utf-8")

    def get_source_files(self):
        return [*super().get_source_files(), ".ci/startup_files.py"]  # a source distribution needs this file to build
