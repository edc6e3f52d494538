"""The compiled core, where there is a compiler; without one the same calls go the general way."""

from glob import glob

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup

core = Extension(
    "mpicoll.transports.shm._native",
    ["mpicoll/transports/shm/_native.pyx"],
    depends=["mpicoll/transports/shm/kernels.h", *glob("mpicoll/transports/shm/*.pxi")],
    include_dirs=[numpy.get_include()],
    define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
    extra_compile_args=["-O3"],
)
extensions = cythonize([core], build_dir="build")
for extension in extensions:
    extension.optional = True  # cythonize makes new ones, without it
setup(ext_modules=extensions)
