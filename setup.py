"""What pyproject.toml can't say: the compiled core, the README for an index, an sdist's bytes.

Without a compiler the core is left out, and the same calls go the general way.
"""

import gzip
import os
import re
import tarfile
from glob import glob
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.sdist import sdist

core = Extension(
    "mpicoll.transports.shm._native",
    ["mpicoll/transports/shm/_native.pyx"],
    depends=["mpicoll/transports/shm/kernels.h", *glob("mpicoll/transports/shm/*.pxi")],
    include_dirs=[numpy.get_include()],
    define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
    extra_compile_args=["-O3", "-g0"],  # debug information names the folder of the build
)
extensions = cythonize([core], build_dir="build")
for extension in extensions:
    extension.optional = True  # cythonize makes new ones, without it


def readme() -> str:
    """Return the README without its links into the repository: on an index they lead nowhere."""
    text = Path("README.md").read_text(encoding="utf-8")
    return re.sub(r"!?\[([^\]]*)\]\((?!https?:|#)[^)]*\)", r"\1", text)


class SameBytes(sdist):
    """An sdist that is the same again if SOURCE_DATE_EPOCH is, as a wheel is."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, **options):
        """Pack `base_dir` in the order of its names, all of one owner and time."""
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if epoch is None or format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, **options)

        def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime = int(epoch)
            entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
            return entry

        path = f"{base_name}.tar.gz"
        with open(path, "wb") as file, gzip.GzipFile("", "wb", 9, file, int(epoch)) as packed:
            with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
                archive.add(base_dir, filter=plain)
        return path


setup(
    ext_modules=extensions,
    cmdclass={"sdist": SameBytes},
    long_description=readme(),
    long_description_content_type="text/markdown",
)
