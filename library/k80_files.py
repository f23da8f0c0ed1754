#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Several files of a role in one go."""

DOCUMENTATION = r"""
module: k80_files
short_description: Write or remove several small files in one go
description:
  - Gives each file its content, owner and mode, and changes nothing that is so already.
  - C(copy) and C(template) cost four round trips a file, which made up half of a run that changes
    nothing; this costs one for all.
  - A file is replaced as a whole, so that nobody ever reads half of it. Missing parent directories
    are made, root's, 0755.
options:
  files:
    description: The files.
    type: list
    elements: dict
    required: true
    suboptions:
      path:
        description: Absolute path.
        type: path
        required: true
      state:
        description: C(absent) removes it.
        type: str
        choices: [present, absent]
        default: present
      content:
        description: What is to be in it.
        type: str
        default: ""
      owner:
        description: User, by name or number.
        type: str
        default: root
      group:
        description: Group, by name or number.
        type: str
        default: root
      mode:
        description: Mode in octal digits.
        type: str
        default: "0644"
      validate:
        description: >-
          Command that judges the new file before it takes its place, with C(%s) for its path.
        type: str
        default: ""
attributes:
  check_mode:
    description: Says what would be changed.
    support: full
  diff_mode:
    description: Shows the contents before and after; C(diff=false) at the task for secrets.
    support: full
"""

EXAMPLES = r"""
- name: Write the units
  k80_files:
    files:
      - path: /etc/systemd/system/example.service
        content: "{{ lookup('ansible.builtin.template', 'example.service.j2') }}"
  register: __units
"""

RETURN = r"""
changed_paths:
  description: Paths of the files that were, or in check mode would be, changed.
  type: list
  elements: str
  returned: success
"""

import os
import shlex
import tempfile

from ansible.module_utils.basic import AnsibleModule


class InvalidError(Exception):
    """What was to be written is not what its reader takes."""


def read(path):
    """The content of the regular file at ``path``; None if there is none."""
    if os.path.islink(path) or not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        return file.read()


def replace(module, path, content, file):
    """Put a file with ``content`` in the place of ``path``; its mode holds from the start."""
    validate = shlex.split(file["validate"])
    parent = os.path.dirname(path)
    os.makedirs(parent, 0o755, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(dir=parent, prefix="." + os.path.basename(path) + ".")
    try:
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        set_attributes(module, draft, file)
        if validate:
            command = [draft if word == "%s" else word for word in validate]
            code, out, err = module.run_command(command)
            if code != 0:
                raise InvalidError("%s says: %s" % (validate[0], (err or out).strip()))
        module.set_context_if_different(draft, module.selinux_default_context(path), False)
        os.rename(draft, path)
    except BaseException:
        os.unlink(draft)
        raise


class Module(AnsibleModule):
    def log(self, msg, log_args=None):
        """Not to the system's log: contents may be secrets.

        AnsibleModule(no_log=True) would not do, for it is overruled by the task's own no_log, which
        would hide from the user why a file was refused.
        """


def set_attributes(module, path, file):
    """Owner, group and mode of ``path``; whether any was, or in check mode is, another."""
    changed = module.set_owner_if_different(path, file["owner"], False)
    changed = module.set_group_if_different(path, file["group"], changed)
    return module.set_mode_if_different(path, file["mode"], changed)


def main():
    module = Module(
        argument_spec={
            "files": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "path": {"type": "path", "required": True},
                    "state": {
                        "type": "str",
                        "choices": ["present", "absent"],
                        "default": "present",
                    },
                    "content": {"type": "str", "default": ""},
                    "owner": {"type": "str", "default": "root"},
                    "group": {"type": "str", "default": "root"},
                    "mode": {"type": "str", "default": "0644"},
                    "validate": {"type": "str", "default": ""},
                },
            }
        },
        supports_check_mode=True,
    )
    os.umask(0o022)
    paths, diff = [], []

    def answer(leave, **result):
        named = {"files": [file["path"] for file in module.params["files"]]}
        leave(changed=bool(paths), invocation={"module_args": named}, **result)

    for file in module.params["files"]:
        path, content = file["path"], file["content"].encode()
        try:
            before = read(path)
            if file["state"] == "absent":
                changed = os.path.lexists(path)
                if changed and not module.check_mode:
                    os.unlink(path)
            elif before == content:
                changed = set_attributes(module, path, file)
            else:
                changed = True
                diff.append(
                    {
                        "before": "" if before is None else before.decode(errors="replace"),
                        "after": file["content"],
                        "before_header": path,
                        "after_header": path,
                    }
                )
                if not module.check_mode:
                    replace(module, path, content, file)
        except (OSError, InvalidError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            answer(module.fail_json, msg="%s could not be changed: %s" % (path, reason))
        if changed:
            paths.append(path)
    # Not even in a detailed log where the task says diff=false.
    answer(module.exit_json, changed_paths=paths, **({"diff": diff} if module._diff else {}))


if __name__ == "__main__":
    main()
