"""Read variables of a MATLAB file in a separate process, because some damaged files crash SciPy's reader.

    python -I mat_program.py '{"path": ..., "names": [...], "searched": [...], "parent": ...}'

Pickles the arrays by name to the standard output. Imports nothing of lit-clip, which would take seconds.
"""

import json
import os
import pickle
import signal
import sys


def main() -> None:
    """Run the program."""
    asked = json.loads(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)):
        signal.signal(number, signal.SIG_IGN)  # sent to all processes of a run, and the parent's to answer
    if sys.platform == "linux":
        import ctypes
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the parent
        if os.getppid() != asked["parent"]:  # it has ended already
            sys.exit(1)
    sys.path = asked["searched"]  # the parent's: the same SciPy
    from scipy.io import loadmat

    content = loadmat(asked["path"], squeeze_me=True)
    found = {name: content[name] for name in asked["names"] if name in content}
    pickle.dump(found, sys.stdout.buffer, protocol=4)  # 5 has functions that ArrayUnpickler does not know


if __name__ == "__main__":
    main()
