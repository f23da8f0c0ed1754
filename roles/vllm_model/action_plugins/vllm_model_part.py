"""Carries a part of a file from one host to another, by way of the controller.

`copy` and `fetch` know whole files only, and `fetch` reads them into memory where Ansible becomes
root; `synchronize` wants rsync on all three, and no password for sudo.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from pathlib import Path
from typing import Any

from ansible import constants
from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase


class ActionModule(ActionBase):
    """Takes a part of a file of the host to a file of the controller, or brings such a file to the
    end of one of the host."""

    _requires_connection = True

    def run(self, tmp: None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result = super().run(tmp, task_vars)
        _, args = self.validate_argument_spec(
            {
                "take": {"type": "path"},
                "bring": {"type": "path"},
                "path": {"type": "path"},
                "offset": {"type": "int", "required": True},
                "size": {"type": "int"},
            },
            mutually_exclusive=[("take", "bring")],
            required_one_of=[("take", "bring")],
            required_by={"take": ("size",), "bring": ("path",)},
        )
        if args["take"]:
            part = self._take(args["take"], args["offset"], args["size"])
            return result | {"changed": False, "part": str(part)}
        part = Path(args["bring"])
        self._bring(part, args["path"], args["offset"])
        part.unlink()
        return result | {"changed": True}

    def _take(self, path: str, offset: int, size: int) -> Path:
        """The part as a file of the controller, in a directory that ends with the run."""
        handle, name = tempfile.mkstemp(prefix="part-", dir=constants.DEFAULT_LOCAL_TMP)
        os.close(handle)
        part = Path(name)
        there = self._temporary()
        # The connection's user, who need not be the one that reads the file, fetches it.
        self._shell(
            f"tail -c +{offset + 1} {shlex.quote(path)} | head -c {size} > {there}"
            f" && chmod 0644 {there}"
        )
        self._connection.fetch_file(there, name)
        self._remove_tmp_path(self._connection._shell.tmpdir)
        if part.stat().st_size != size:
            raise AnsibleActionFail(f"{path} has become shorter while it was sent; run again.")
        return part

    def _bring(self, part: Path, path: str, offset: int) -> None:
        there = self._temporary()
        self._transfer_file(str(part), there)
        target = shlex.quote(path)
        self._shell(f'[ "$(stat -c %s {target})" = {offset} ] && cat {there} >> {target}')
        self._remove_tmp_path(self._connection._shell.tmpdir)

    def _temporary(self) -> str:
        if self._connection._shell.tmpdir is None:
            self._make_tmp_path()
        return str(self._connection._shell.join_path(self._connection._shell.tmpdir, "part"))

    def _shell(self, command: str) -> None:
        done = self._low_level_execute_command(command)
        if done["rc"] != 0:
            said = done["stderr"].strip() or "another run changes the same file; let it end"
            raise AnsibleActionFail(f"A part of a model was not carried: {said}.")
