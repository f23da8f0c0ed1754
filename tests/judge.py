"""What preflight makes of a host, without a run of Ansible."""

from __future__ import annotations

import time
from pathlib import Path
from types import ModuleType
from typing import Any

from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar
from made_up_host import KERNEL

ROOT = Path(__file__).resolve().parent.parent
FACTS = {
    "distribution": "Debian",
    "distribution_major_version": "12",
    "os_family": "Debian",
    "architecture": "x86_64",
    "kernel": KERNEL,
    "service_mgr": "systemd",
    "memtotal_mb": 65536,
    "default_ipv4": {"address": "192.0.2.7"},
}
SETTINGS = {
    "vllm_instance_api_key": "k3y-Of-The-Instances-0123456789",
    "gateway_api_keys": [{"name": "anna", "key": "k3y-Of-Anna-0123456789-abcdef"}],
    # Neither this machine's disk nor its network is the matter.
    "preflight_disk_free_gb": {},
    "preflight_try_repositories": False,
}


class Judge:
    """The checks, on what the module sees below a root and on an inventory's variables."""

    def __init__(self, module: ModuleType, plugin: ModuleType) -> None:
        self.module, self.plugin = module, plugin
        self._loader = DataLoader()
        self._roles = plugin.load_roles(ROOT / "roles", self._load)
        files = [*ROOT.glob("group_vars/all/*.yml"), ROOT / "roles/preflight/vars/main.yml"]
        self._variables = {name: v for path in files for name, v in self._load(path).items()}

    def _load(self, path: Path) -> Any:
        return self._loader.load_from_file(str(path), trusted_as_template=True)

    def _template(self, value: Any, scope: dict[str, Any]) -> Any:
        return Templar(self._loader, variables=scope).template(value)

    def host(
        self, groups: list[str] | None = None, facts: dict[str, Any] | None = None, **variables: Any
    ) -> Any:
        """A host that is in these groups, and a server unless told otherwise."""
        names = groups or ["k80_servers"]
        ansible = {
            "inventory_hostname": "server",
            "groups": {"k80_servers": ["another"]} | {name: ["server"] for name in names},
            "group_names": names,
            "ansible_facts": FACTS | (facts or {}),
        }
        inventory = self._variables | ansible | SETTINGS | variables
        return self.plugin.Host(inventory, self._roles, self._template)

    def __call__(
        self, root: Path, ahead: float = 0, **variables: Any
    ) -> tuple[list[str], list[str]]:
        """The findings and the warnings; its clock is so many seconds ahead."""
        host = self.host(preflight_root=str(root), **variables)
        apt_repositories, urls = self.plugin.role_repositories(host)
        given = {
            "root": str(root),
            "disabled_dies": host.disabled_dies,
            "space": host.serving_paths(),
            "repositories": host.is_true("preflight_try_repositories"),
            "apt_repositories": apt_repositories,
            "urls": urls,
            "now": time.time() - ahead,
            "timeout": 5,
        }
        host.seen = self.module.look_at_host(given, time.time())
        told = list(self.plugin.told_of(host))
        warnings = [str(s) for s in told if isinstance(s, self.plugin.Warn)]
        return [str(s) for s in told if not isinstance(s, self.plugin.Warn)], warnings
