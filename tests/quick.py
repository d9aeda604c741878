"""A stand-in for the command `python`. Its processes are forks of one that has imported torch already.

So Snakemake, papermill and its kernels run as they are, without the seconds that each new Python needs.
(matplotlib is left to them: what it imports depends on what they are told.)
"""
import atexit
import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
import traceback
from pathlib import Path

from tiny import SERVER

IMPORTED = "papermill.cli", "ipykernel.kernelapp", "lfdm.studies", "lfdm.images.task", "snakemake.cli"
COMMAND = """#!{python} -IS
import json, os, signal, socket, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)   # that is for the fork
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
    server.connect({address!r})
    told = json.dumps([sys.argv[sys.argv.index("-m") + 1:], os.getcwd(), dict(os.environ)])
    socket.send_fds(server, [told.encode()], [0, 1, 2])
    sys.exit(int(server.recv(9) or 1))
"""


def execute(command, words, folder, env, files):
    "What `python -m words` does. The exit status."
    for number, file in enumerate(files): os.dup2(file, number)
    os.chdir(folder)
    os.environ.clear(), os.environ.update(env)
    sys.executable, sys.argv, sys.path[0] = command, list(words), folder
    try: runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as e: return e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def answer(command, caller):
    "Run what a caller asks for, and tell it the exit status."
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    told, files, *_ = socket.recv_fds(caller, 10**6, 3)
    if (child := os.fork()) == 0:
        caller.close()
        code = execute(command, *json.loads(told), files)
        threading._shutdown(), atexit._run_exitfuncs()   # all that was imported is left as it is
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    for file in files: os.close(file)
    caller.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())


def serve(command, address):
    "Until the tests end."
    for name in IMPORTED:
        with contextlib.suppress(ImportError): importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    parent = os.getppid()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind(address), door.listen(), door.settimeout(1)
        while os.getppid() == parent:
            with contextlib.suppress(TimeoutError):
                caller, _ = door.accept()
                if os.fork() == 0:
                    door.close()
                    try: answer(command, caller)
                    finally: os._exit(0)
                caller.close()


@contextlib.contextmanager
def python():
    "The path of the command."
    with tempfile.TemporaryDirectory() as folder:
        command, address = Path(folder) / "python", f"{folder}/door"
        command.write_text(COMMAND.format(python=sys.executable, address=address))
        command.chmod(0o755)
        server = SERVER.Process(target=serve, args=(str(command), address))
        server.start()
        while not os.path.exists(address) and server.is_alive(): server.join(.05)
        try: yield command
        finally: server.terminate(), server.join()
