"""What the emulated server has: one directory of files per die, which every part of it reads.

`/etc/k80-emulator/dies/0000:05:00.0/` holds

    minor           N of /dev/nvidiaN
    uuid            what nvidia-smi and the container runtime call the die
    parent          path below /sys/devices of the bridge it hangs on
    lost            present: the die has fallen off the bus
    driver          the driver that has the die, instead of nvidia; empty: none has it
    <query field>   any field of `nvidia-smi --query-gpu`: `echo 95 > temperature.gpu`

A fault is injected by changing these files; a die is removed by removing its directory. What
nvidia-smi has set, which a boot forgets, is in `/run/k80-emulator/dies/0000:05:00.0/`; a file above
outranks it: the card that does not do what it is told.

Until the next boot a die is off the bus, as if it were not in the server, that a rule of udev's has
removed at boot (`/run/k80-emulator/ruled-off`) or somebody since
(`/run/k80-emulator/removed/0000:05:00.0`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

STATE = Path(os.environ.get("K80_EMULATOR_STATE", "/etc/k80-emulator"))
RUN = Path(os.environ.get("K80_EMULATOR_RUN", "/run/k80-emulator"))
DEV = Path(os.environ.get("K80_EMULATOR_DEV", "/dev"))


@dataclass(frozen=True)
class Die:
    pci_address: str
    directory: Path

    @property
    def settings(self) -> Path:
        return RUN / "dies" / self.pci_address

    def read(self, name: str, default: str = "") -> str:
        for directory in (self.directory, self.settings):
            try:
                return (directory / name).read_text().strip()
            except FileNotFoundError:
                continue
        return default

    def set(self, name: str, value: str) -> None:
        """What a boot forgets."""
        self.settings.mkdir(parents=True, exist_ok=True)
        (self.settings / name).write_text(f"{value}\n")

    @property
    def uuid(self) -> str:
        return self.read("uuid")

    @property
    def minor(self) -> int:
        return int(self.read("minor"))

    @property
    def node(self) -> Path:
        return DEV / f"nvidia{self.minor}"

    @property
    def lost(self) -> bool:
        return (self.directory / "lost").exists()


def off_the_bus() -> set[str]:
    ruled = RUN / "ruled-off"
    removed = {path.name for path in (RUN / "removed").glob("*")}
    return removed | {*(ruled.read_text().split() if ruled.exists() else [])}


def dies() -> list[Die]:
    """Every die on the bus, in its order, which is also nvidia-smi's."""
    found = [Die(path.name, path) for path in sorted((STATE / "dies").glob("*")) if path.is_dir()]
    return [die for die in found if die.pci_address not in off_the_bus()]
