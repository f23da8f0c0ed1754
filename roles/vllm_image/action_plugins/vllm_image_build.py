"""Builds the image on the server and tells, line by line, how far it is.

The build is a transient systemd unit. It outlives a lost connection; the next run finds it and
follows it to its end. The Dockerfile announces its steps with lines that begin with "== ", and so
does the script that compiles the kernels on the server, where the image does not.
"""

import base64
import re
import shlex
import time

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

POLL_SECONDS = 3
REMINDER_SECONDS = 60
STEP = re.compile(r"^(?:#\d+ +[\d.]+ )?== (.+)$", re.MULTILINE)
# What BuildKit prints of each step, whether it matters or not.
CHATTER = re.compile(r"#\d+ (sha256:|CACHED|DONE|\[)|\s*$")


class ActionModule(ActionBase):
    TRANSFERS_FILES = True
    _requires_connection = True

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        _, args = self.validate_argument_spec(
            {
                "context": {"type": "str", "required": True},
                "reference": {"type": "str", "required": True},
                "build_args": {"type": "dict", "required": True},
                "nvcc": {"type": "str", "default": ""},
                "directory": {"type": "path", "required": True},
                "log": {"type": "path", "required": True},
                "timeout": {"type": "int", "required": True},
            }
        )
        self._host = self._task.delegate_to or task_vars["inventory_hostname"]
        self._log = args["log"]
        tag = args["reference"].rpartition(":")[2]
        unit = f"vllm-k80-image-{tag}.service"

        started = time.monotonic()
        if self._state(unit)["ActiveState"] in ("active", "activating"):
            self._say("a build of this image is running already: following it")
        else:
            self._start(unit, args)
        outcome = self._follow(unit)

        if outcome != "success":
            took = f"took longer than vllm_image_build_timeout ({args['timeout']} s)"
            reason = took if outcome == "timeout" else "failed"
            log = self._command(["tail", "-n", "200", self._log]).splitlines()
            lines = "\n".join([line[:300] for line in log if not CHATTER.match(line)][-20:])
            raise AnsibleActionFail(
                f"The build of {args['reference']} {reason}. The whole log is {self._log} on "
                f"{self._host}; its last lines are:\n{lines}"
            )
        minutes, seconds = divmod(int(time.monotonic() - started), 60)
        return result | {
            "changed": True,
            "msg": f"{args['reference']} built in {minutes} min {seconds} s",
        }

    def _start(self, unit, args):
        directory = self._make_tmp_path()
        context = self._connection._shell.join_path(directory, "context.tar.gz")
        self._transfer_data(context, base64.b64decode(args["context"]))
        build = [
            *("docker", "build", "--progress=plain", "--file=docker/Dockerfile"),
            f"--tag={args['reference']}",
            *(f"--build-arg={name}={value}" for name, value in args["build_args"].items()),
        ]
        if args["nvcc"]:
            script = self._connection._shell.join_path(directory, "compile-and-build")
            self._transfer_file(self._find_needle("files", "compile-and-build"), script)
            build = ["sh", script, args["directory"], args["nvcc"], *build]
        else:
            build += ["-"]
        # What an earlier failure left; that there is none is no error.
        self._execute(["systemctl", "reset-failed", unit])
        self._command(
            [
                "systemd-run",
                f"--unit={unit}",
                f"--description=Build of {args['reference']}",
                f"--property=StandardInput=file:{context}",
                f"--property=StandardOutput=truncate:{self._log}",
                f"--property=StandardError=append:{self._log}",
                f"--property=RuntimeMaxSec={args['timeout']}",
                "--setenv=DOCKER_BUILDKIT=1",
                "--setenv=HOME=/root",
                *build,
            ]
        )

    def _follow(self, unit):
        """Shows the steps until the unit has ended; returns systemd's word for how."""
        shown = 0
        began = spoke = time.monotonic()
        while True:
            state = self._state(unit)
            steps = STEP.findall(self._execute(["grep", "-a", "== ", self._log])["stdout"])
            for step in steps[shown:]:
                self._say(step)
                spoke = time.monotonic()
            shown = len(steps)
            if state["ActiveState"] not in ("active", "activating", "deactivating"):
                return state["Result"]
            if time.monotonic() - spoke >= REMINDER_SECONDS:
                self._say(f"still building, {int(time.monotonic() - began) // 60} min so far")
                spoke = time.monotonic()
            time.sleep(POLL_SECONDS)

    def _state(self, unit):
        shown = self._command(["systemctl", "show", "--property=ActiveState,Result", unit])
        return dict(line.strip().split("=", 1) for line in shown.splitlines() if "=" in line)

    def _command(self, argv):
        done = self._execute(argv)
        if done["rc"] != 0:
            raise AnsibleActionFail(
                f"{shlex.join(argv)} failed on {self._host} (exit code {done['rc']}): "
                f"{(done.get('stderr') or done['stdout']).strip()}"
            )
        return done["stdout"]

    def _execute(self, argv):
        return self._low_level_execute_command(shlex.join(argv), sudoable=True)

    def _say(self, text):
        Display().display(f"  {self._host}: {text}")
