"""Runs a command as a child and ends it when standard input closes: a broker must not outlive the tests.

Run as a script, ``python -I -S _guardian.py COMMAND …``, with nothing but the standard library. The parent keeps the
other end of standard input; when it dies, however it dies, the kernel closes that end. PR_SET_PDEATHSIG would do
without this process, but Linux sends it when the *thread* that started the child ends, and Trio starts processes in
worker threads; a preexec_fn for it could deadlock in a program with threads. The first line of standard output is the
child's process identifier; the exit code is the child's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading


def main(command: list[str]) -> int:
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr) as child:

        def watch() -> None:
            while os.read(0, 1024):
                pass
            child.kill()

        sys.stdout.write(f"{child.pid}\n")
        sys.stdout.flush()
        threading.Thread(target=watch, daemon=True).start()
        code = child.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    # Not sys.exit: the watching thread is blocked in a read.
    os._exit(main(sys.argv[1:]))
