"""What enters the image: its content hash, and the archive that Docker builds from.

And of an image that is made already: what its archive says of it, and which parts of it are whole.
"""

import base64
import fcntl
import gzip
import hashlib
import io
import json
import tarfile
import zlib
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


def archived_image(archive, cache):
    """Reference, ID and size in bytes of the one image in the output of `docker save`.

    A compressed archive must be read to its end for that, so what it says is kept in `cache`.
    """
    path = Path(archive).expanduser().resolve()
    name = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    kept = Path(cache) / f"archive-{name}.json"
    try:
        stat = path.stat()
        kept.parent.mkdir(parents=True, exist_ok=True)
        with kept.open("a+") as file:
            # Of the hosts of a play one reads the archive; the others wait for what it says.
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            version = [stat.st_mtime_ns, stat.st_size]
            try:
                known = json.load(file)
            except ValueError:
                known = {}
            if known.get("version") != version:
                known = {"version": version, "image": read_archive(path)}
                file.truncate(0)
                json.dump(known, file)
            return known["image"]
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise AnsibleFilterError(
            f"vllm_image_archive: {path} cannot be read ({error}); "
            "it must be the output of docker save, as it is or through gzip, on this machine."
        ) from None


def read_archive(path):
    """What archived_image returns, from the archive itself."""
    small, size = {}, 0
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    with tarfile.open(path, "r:gz" if compressed else "r:") as archive:
        for member in archive:
            size += member.size
            # The manifest comes last, so what might be the configuration that it names is kept.
            if member.isfile() and member.size < 1 << 20:
                small[member.name] = archive.extractfile(member).read()
    try:
        images = json.loads(small["manifest.json"])
        configurations = {image["Config"] for image in images}
        tags = [tag for image in images for tag in image["RepoTags"] or []]
        digests = [hashlib.sha256(small[name]).hexdigest() for name in configurations]
    except (KeyError, ValueError, TypeError) as error:
        raise tarfile.ReadError("there is no image in it that docker load would know") from error
    if len(digests) != 1 or len(tags) != 1:
        raise tarfile.ReadError(
            f"it has {len(digests)} images with {len(tags)} names, but one with one is wanted"
        )
    # Docker leaves the name of its own registry out; others write it.
    reference = tags[0].removeprefix("docker.io/").removeprefix("library/")
    return {"reference": reference, "id": f"sha256:{digests[0]}", "bytes": size}


def part_names(directory):
    """The parts that the list of checksums in `directory` names; none without it."""
    return [name for _, name in checksums(directory)]


def unsound_parts(directory):
    """Those of them that are missing there, or not what the list says."""
    unsound = []
    for digest, name in checksums(directory):
        path = Path(directory) / name
        if not path.is_file() or file_digest(path) != digest:
            unsound.append(name)
    return unsound


def checksums(directory):
    listed = Path(directory) / "SHA256SUMS"
    return [line.split() for line in listed.read_text().splitlines()] if listed.exists() else []


def file_digest(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FilterModule:
    def filters(self):
        return {
            "vllm_image_tag": image_tag,
            "vllm_image_context": build_context,
            "vllm_image_archived": archived_image,
            "vllm_image_parts": part_names,
            "vllm_image_unsound_parts": unsound_parts,
        }
