"""A stand-in for a training: python fake.py FOLDER [key=value ...], without JAX.

It notes each execution in FOLDER/../../executions.log, writes metrics.jsonl step by step (resuming where it was), and
prints one JSON line.  value: the result;  steps, pause: how long it takes;  fail: exit code;  kill=1: SIGKILLs itself
in the first execution;  noise=1: leaves an unfinished progress bar on stderr before the JSON.
"""

import json
import os
import pathlib
import signal
import sys
import time

folder = pathlib.Path(sys.argv[1])
options = dict(word.split("=", 1) for word in sys.argv[2:])
value, steps = float(options.get("value", 0)), int(options.get("steps", 1))

signal.signal(signal.SIGTERM, lambda *_: (print("saved on SIGTERM", flush=True), sys.exit(143)))
with open(folder.parent.parent / "executions.log", "a") as log:
    log.write(f"{folder.name} {os.getpid()}\n")

path = folder / "metrics.jsonl"
begun = len(path.read_text().splitlines()) if path.exists() else 0
for step in range(begun + 1, steps + 1):
    time.sleep(float(options.get("pause", 0)))
    row = {"step": step, "loss": value + 1 / step}
    if step == 1:
        row["rare"] = 7
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    if options.get("kill") == "1" and begun == 0:
        os.kill(os.getpid(), signal.SIGKILL)
if "fail" in options:
    print("RuntimeError: the loss is not finite", file=sys.stderr)
    sys.exit(int(options["fail"]))
if options.get("noise") == "1":
    sys.stderr.write("\r 50%|#####     | 1/2")
print(json.dumps({"score": value, "begun": begun}))
