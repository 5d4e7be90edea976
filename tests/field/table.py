"""The table of programs (`programs`), one line each."""

import dataclasses
import pathlib
import shutil
import subprocess

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
INSTALLED = ROOT / "target/field"
# Seconds that an undisturbed run may take, by class.
LONGEST = {"quick": 60, "small": 240, "large": 600}


@dataclasses.dataclass(frozen=True)
class Program:
    """One line of the table: NAME PACKAGES CLASS COMMAND."""

    name: str
    packages: tuple[str, ...]
    size: str
    # It is known to be refused, and by that must not be harmed.
    refused: bool
    command: str

    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [package for package in self.packages if not installed(package)]


def programs() -> list[Program]:
    """All of them, in the order of the table."""
    found = []
    for line in (HERE / "programs").read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, packages, size, command = line.split(None, 3)
        refused = size.endswith("!")
        size = size.rstrip("!")
        if size not in LONGEST:
            raise SystemExit(f"{name}: no such class: {size}")
        packages = () if packages == "-" else tuple(packages.split(","))
        found.append(Program(name, packages, size, refused, command))
    names = [program.name for program in found]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise SystemExit(f"twice in the table: {', '.join(sorted(twice))}")
    return found


def installed(package: str) -> bool:
    """Whether a package is there: one of Debian's, or KIND:NAME of another registry (see
    scripts/install-field-deps)."""
    kind, _, name = package.rpartition(":")
    if not kind:
        query = ["dpkg-query", "-W", "-f", "${Status}", name]
        said = subprocess.run(query, capture_output=True, text=True, check=False)
        return "install ok installed" in said.stdout
    if kind == "program":
        return shutil.which(name) is not None
    return (INSTALLED / "installed" / f"{kind}:{name.replace('/', '!')}").exists()
