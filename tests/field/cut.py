#!/usr/bin/python3
"""One program in a pid namespace of its own, as process 1: an undisturbed run, then runs that are cut
at random moments into checkpoint, kill and restore. Reads an order from standard input (JSON), prints
what was seen (JSON)."""

import contextlib
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import time

# Runs until all cuts were made: one that ended before its last cut is followed by another one.
RUNS = 4
# Seconds for one checkpoint or restore.
TOOL = 120


def longest_of_all(order: dict) -> float:
    """Seconds after which all runs of an order have ended, or hang."""
    return (1 + RUNS) * (order["longest"] + order["cuts"] * 2 * TOOL)


class Refused(Exception):
    """`ckpt` says why a checkpoint cannot be had; the program goes on."""


class Failed(Exception):
    """What must not happen."""


class World:
    """Processes of this namespace: starts them, and reaps all that end."""

    def __init__(self, order: dict, place: pathlib.Path):
        self.order, self.place = order, place
        self.ends: dict[int, int] = {}

    def give(self, path: pathlib.Path) -> None:
        """Makes it the user's that is wanted."""
        if self.order["uid"] is not None:
            os.chown(path, self.order["uid"], self.order["uid"])

    def start(self, command: list[str], where: pathlib.Path, output: pathlib.Path) -> int:
        """Starts a command as the user that is wanted; its pid."""
        uid, home = self.order["uid"], str(where)
        installed = pathlib.Path(__file__).resolve().parent.parent.parent / "target/field"
        own = [str(installed / kind / "bin") for kind in ("pip", "npm", "cargo", "go")]
        path = own + "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin:/usr/games".split(":")
        src = str(pathlib.Path(__file__).resolve().parent / "src")
        env = {"PATH": ":".join(path), "HOME": home, "LANG": "C.UTF-8", "TERM": "xterm", "TZ": "UTC"}
        env |= {"SHELL": "/bin/bash", "SRC": src, "FIELD": str(installed)}
        # Node.js of Debian 13 makes an io_uring, which is refused, unless it is told not to.
        env["UV_USE_IO_URING"] = "0"
        with output.open("ab") as out:
            child = subprocess.Popen(  # noqa: S603
                command,
                cwd=where,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                user=uid,
                group=uid,
                extra_groups=None if uid is None else [],
            )
        # It is waited for here alone.
        child.returncode = 0
        return child.pid

    def reap(self) -> bool:
        """Reaps all that have ended; whether any process is left."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return True
                self.ends[pid] = os.waitstatus_to_exitcode(status)
        return False

    def ended(self, pid: int) -> int | None:
        """Its exit code, 128 and the signal, or None while it runs."""
        self.reap()
        code = self.ends.get(pid)
        return code if code is None or code >= 0 else 128 - code

    def wait(self, pid: int, seconds: float, what: str) -> int:
        """Its exit code; a hang is told with what all processes do."""
        until = time.monotonic() + seconds
        while (code := self.ended(pid)) is None:
            if time.monotonic() > until:
                raise Failed(f"{what} hangs\n{everyone()}")
            time.sleep(0.002)
        return code

    def all_gone(self) -> None:
        """Waits until nothing is left of a job that was killed."""
        until = time.monotonic() + 30
        while self.reap():
            if time.monotonic() > until:
                raise Failed(f"processes outlive their job\n{everyone()}")
            time.sleep(0.002)

    def tool(self, name: str, arguments: list[str]) -> tuple[int, str]:
        """`ckpt` or `restore` to its end: exit code and messages."""
        log = self.place / "tool.log"
        log.unlink(missing_ok=True)
        pid = self.start([f"{self.order['bin']}/{name}", *arguments], self.place, log)
        code = self.wait(pid, TOOL, f"{name} {' '.join(arguments)}")
        return code, log.read_text(errors="replace").strip()


def everyone() -> str:
    """What each process of this namespace does."""
    lines = []
    for entry in sorted(pathlib.Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        for task in sorted(entry.glob("task/*")):
            with contextlib.suppress(OSError):
                state = re.search(r"State:\s*(\S)", (task / "status").read_text())[1]
                tracer = re.search(r"TracerPid:\s*(\d+)", (task / "status").read_text())[1]
                call = (task / "syscall").read_text().split()[0]
                comm, wchan = (task / "comm").read_text().strip(), (task / "wchan").read_text()
                lines.append(f"  {entry.name}/{task.name} {comm}: {state}, tracer {tracer}, call {call}, {wchan}")
    return "\n".join(lines[:60])


class Run:
    """One run of the program."""

    def __init__(self, world: World, name: str):
        self.world = world
        self.dir = world.place / name
        self.dir.mkdir()
        self.output = self.dir / ".output"
        self.output.touch()
        world.give(self.dir)
        world.give(self.output)
        self.began = time.monotonic()
        self.paused = 0.0
        self.front = self.pid = world.start(["bash", "-c", world.order["command"]], self.dir, self.output)

    def age(self) -> float:
        """Seconds that it has run."""
        return time.monotonic() - self.began - self.paused

    def finish(self) -> tuple[int, str]:
        """Waits for its end: exit code and output. Nothing of it is left then."""
        code = self.world.wait(self.front, self.world.order["longest"], "the program")
        self.world.all_gone()
        return code, self.output.read_text(errors="replace")

    def runs_until(self, age: float) -> bool:
        """Waits until it has run for so long; false if it ends before."""
        while self.age() < age:
            if self.world.ended(self.front) is not None:
                return False
            time.sleep(0.0005)
        return True

    def attach(self, image: pathlib.Path, options: list[str]) -> bool:
        """A checkpoint; false if the program ends first."""
        code, said = self.world.tool("ckpt", ["attach", str(self.pid), "-o", str(image), *options])
        if code == 0:
            return True
        # A program that is at its end cannot be attached to.
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            if self.world.ended(self.front) is not None:
                return False
            time.sleep(0.01)
        raise Refused(said)

    def copy(self, image: pathlib.Path) -> bool:
        """A checkpoint that the program does not notice."""
        began = time.monotonic()
        made = self.attach(image, [])
        self.paused += time.monotonic() - began
        return made

    def cut(self, image: pathlib.Path) -> bool:
        """Checkpoint, kill, restore; false if the program ends first."""
        began = time.monotonic()
        if not self.attach(image, ["--kill"]):
            return False
        self.world.wait(self.front, 30, "the job after attach --kill")
        self.world.all_gone()
        log = self.world.place / "restore.log"
        log.unlink(missing_ok=True)
        self.front = self.world.start([f"{self.world.order['bin']}/restore", "-v", str(image)], self.world.place, log)
        while not (running := re.search(r"running as process (\d+)", log.read_text(errors="replace"))):
            code = self.world.ended(self.front)
            if code is not None and "running as process" not in log.read_text(errors="replace"):
                raise Failed(f"restore ends with {code}: {log.read_text(errors='replace').strip()}")
            if time.monotonic() - began > 2 * TOOL:
                raise Failed(f"restore hangs: {log.read_text(errors='replace').strip()}\n{everyone()}")
            time.sleep(0.002)
        self.pid = int(running[1])
        self.paused += time.monotonic() - began
        return True


def cut_up(world: World, expected: tuple[int, str], seconds: float) -> int:
    """Runs the program with cuts until all were made; their number."""
    chance, wanted, made = random.Random(world.order["seed"]), world.order["cuts"], 0
    image = world.place / "images/job.ckpt"
    for number in range(1, 1 + RUNS):
        run = Run(world, f"run{number}")
        moments = sorted(chance.uniform(0.02, 0.9) * seconds for _ in range(wanted - made))
        copied = chance.uniform(0.02, 0.9) * seconds
        steps = sorted([(moment, run.cut) for moment in moments] + [(copied, run.copy)], key=lambda step: step[0])
        told = []
        for moment, step in steps:
            try:
                if not run.runs_until(moment) or not step(image):
                    break
            except Refused:
                # It goes on, and comes to its end like any other.
                if (seen := run.finish()) != expected:
                    raise Failed(f"refused, and harmed by it: {difference(expected, seen)}") from None
                raise
            made += step == run.cut
            told.append(f"{moment:.3f}{'' if step == run.cut else ' (attach)'}")
        seen = run.finish()
        # It took less than the undisturbed run if it ended early.
        seconds = min(seconds, run.age())
        if seen != expected:
            raise Failed(f"after cuts at {', '.join(told)} of {seconds:.3f} s: {difference(expected, seen)}")
        if made >= wanted:
            break
    if made == 0:
        raise Failed("ended before every cut")
    return made


def difference(expected: tuple[int, str], seen: tuple[int, str]) -> str:
    """How two results differ."""
    if expected[0] != seen[0]:
        return f"exit code {seen[0]} and not {expected[0]}: {seen[1][-1500:]}"
    wanted, got = expected[1].splitlines(), seen[1].splitlines()
    for number, (one, other) in enumerate(zip(wanted, got), 1):
        if one != other:
            return f"line {number} is {other[:300]!r} and not {one[:300]!r}"
    return f"{len(got)} lines and not {len(wanted)}: {got[len(wanted):][:3] or wanted[len(got):][:3]}"


def main(order: dict) -> dict:
    """What was seen."""
    os.setsid()
    place = pathlib.Path(order["place"])
    tmp, images = place / "tmp", place / "images"
    tmp.mkdir()
    tmp.chmod(0o1777)
    images.mkdir()
    if os.geteuid() == 0:
        subprocess.run(["mount", "--bind", str(tmp), "/tmp"], check=True)
    world = World(order, place)
    world.give(images)
    world.give(place)
    seen = {"verdict": "pass"}
    try:
        run = Run(world, "undisturbed")
        expected = run.finish()
        if expected[0] != 0:
            raise Failed(f"undisturbed: exit code {expected[0]}: {expected[1][-1000:]}")
        seen["seconds"] = run.age()
        seen["cuts"] = cut_up(world, expected, seen["seconds"])
    except Refused as reason:
        seen |= {"verdict": "refused", "why": str(reason)}
    except Failed as reason:
        seen |= {"verdict": "failed", "why": str(reason)}
    return seen


if __name__ == "__main__":
    print(json.dumps(main(json.load(sys.stdin))))
