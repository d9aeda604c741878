"""Make .venv with the pinned packages, quietly: a line says how far it is, .venv/setup.log has the rest.

    python tools/set_up.py      # with any Python that is new enough; make does this by itself, once
"""
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON, LOG, READY = VENV / "bin/python", VENV / "setup.log", VENV / "ready"
PINNED = ["--constraint", "constraints.txt"]
UV = [PYTHON, "-m", "uv", "pip", "install", "--python", PYTHON]
STEPS = {"uv, which installs": [PYTHON, "-m", "pip", "install", "--quiet", *PINNED, "uv"],
         "the pinned packages": [*UV, *PINNED, "--build-constraint", "constraints.txt",
                                 "--compile-bytecode", "--editable", ".[dev]"]}
TAIL = 20   # lines of the log that are shown when a step fails


class Line:
    "One line that is written over; off a terminal, a line for each step."
    def __init__(self): self.start, self.terminal, self.last = time.monotonic(), sys.stdout.isatty(), None

    def seconds(self): return round(time.monotonic() - self.start)

    def say(self, step, detail=""):
        "Show the step, the time, and what the installer said last."
        text = f"Set-up: {step}"
        if self.terminal:
            text += f" ... {self.seconds()} s" + f"  ({detail})" * bool(detail)
            print(f"\r\033[K{text[:os.get_terminal_size().columns - 1]}", end="", flush=True)
        elif step != self.last: print(text, flush=True)
        self.last = step

    def end(self, text): print("\r\033[K" * self.terminal + text, flush=True)


def last_line(log):
    "What the installer said last, without colours."
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((" ".join(line.split()) for line in reversed(lines) if line.strip()), "")


def install(line):
    "Run the steps; end with the log's last lines where one fails."
    with open(LOG, "w", encoding="utf-8") as log:
        for step, command in STEPS.items():
            child = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            while child.poll() is None:
                line.say(step, last_line(LOG))
                time.sleep(0.2)
            if child.returncode:
                line.end(f"Set-up: {step}: failed after {line.seconds()} s. The end of .venv/setup.log:")
                print(*LOG.read_text(errors="replace").splitlines()[-TAIL:], sep="\n")
                sys.exit(1)


def configure():
    "A kernel that serves this machine need not warn that it does not encrypt, or that it is told to end."
    config = VENV / "etc/ipython/ipython_kernel_config.py"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text("c.IPKernelApp.log_level = 'CRITICAL'\n")


if __name__ == "__main__":
    backend = os.environ.get("UV_TORCH_BACKEND")
    size = f"with torch for {backend}" if backend else "about 6 GB; less with UV_TORCH_BACKEND=cpu"
    print(f"Set-up, once: the pinned packages go into .venv ({size}). The log: .venv/setup.log", flush=True)
    line = Line()
    line.say("an environment")
    if not READY.exists(): venv.create(VENV, clear=True, with_pip=True)
    READY.unlink(missing_ok=True)   # written last: without it a set-up was cut short, and starts afresh
    install(line)
    configure()
    packages = len(list(VENV.glob("lib/python*/site-packages/*.dist-info")))
    READY.touch()
    line.end(f"Set-up: done in {line.seconds()} s, {packages} packages.")
