"""What enters the image: its content hash, and the archive that Docker builds from."""

import base64
import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

from ansible.errors import AnsibleFilterError

# The same choice as docker/Dockerfile.dockerignore makes, for builds by hand.
CONTENT = (
    "CMakeLists.txt",
    "README.md",
    "csrc/**/*",
    "docker/Dockerfile",
    "docker/build.lock",
    "docker/kernels.lock",
    "docker/runtime.lock",
    "docker/torch.lock",
    "docker/vllm.lock",
    "pyproject.toml",
    "vllm_k80.pth",
    "vllm_k80/**/*",
)


def content_files(source):
    """The files of `source` that enter the image, by their path in it, in order."""
    root = Path(source)
    files = {}
    for pattern in CONTENT:
        found = {
            str(path.relative_to(root)): path
            for path in root.glob(pattern)
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".fatbin"
        }
        if not found:
            raise AnsibleFilterError(
                f"vllm_image_source: there is no {pattern} in {source}; "
                "it must be the directory vllm-k80-src of this project."
            )
        files |= found
    return dict(sorted(files.items()))


def image_tag(source, build_args):
    """16 hex digits that change with any file or build argument that the image is made of."""
    digest = hashlib.sha256(json.dumps(build_args, sort_keys=True).encode())
    for name, path in content_files(source).items():
        digest.update(f"\0{name}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def build_context(source):
    """The files as a gzipped tar archive, in base64. Equal contents make equal bytes."""
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name, path in content_files(source).items():
            data = path.read_bytes()
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            entry.mode = 0o644
            archive.addfile(entry, io.BytesIO(data))
    return base64.b64encode(buffer.getvalue()).decode()


class FilterModule:
    def filters(self):
        return {"vllm_image_tag": image_tag, "vllm_image_context": build_context}
