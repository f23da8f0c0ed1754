#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""How much room there is for files that are yet to come."""

DOCUMENTATION = r"""
module: free_space
short_description: Read the free space below some paths
description:
  - For each path, which need not exist yet, the free space of its filesystem.
options:
  paths:
    description: Absolute paths.
    type: list
    elements: path
    required: true
attributes:
  check_mode:
    description: Changes nothing, ever.
    support: full
"""

EXAMPLES = r"""
- name: Read the free space for images
  free_space:
    paths: [/var/lib/docker]
  register: __space
"""

RETURN = r"""
space:
  description: One entry per path.
  type: list
  elements: dict
  returned: success
  contains:
    path:
      description: The path asked for.
      type: str
    exists:
      description: Whether it is there.
      type: bool
    filesystem:
      description: The same number for paths on the same filesystem.
      type: int
    free_bytes:
      description: What is free there, less what the filesystem keeps for root.
      type: int
"""

import os

from ansible.module_utils.basic import AnsibleModule


def space_of(path):
    there = os.path.abspath(path)
    while not os.path.exists(there):
        there = os.path.dirname(there)
    filesystem = os.statvfs(there)
    return {
        "path": path,
        "exists": os.path.exists(path),
        "filesystem": os.stat(there).st_dev,
        "free_bytes": filesystem.f_bavail * filesystem.f_frsize,
    }


def main():
    module = AnsibleModule(
        argument_spec={"paths": {"type": "list", "elements": "path", "required": True}},
        supports_check_mode=True,
    )
    module.exit_json(changed=False, space=[space_of(path) for path in module.params["paths"]])


if __name__ == "__main__":
    main()
