"""What the image is made of: its content hash, the archive that is sent, the lock files."""

from __future__ import annotations

import base64
import importlib.util
import io
import posixpath
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from ansible.errors import AnsibleFilterError

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "vllm-k80-src"
DOCKER = SOURCE / "docker"
BUILD_ARGS = {"BASE_IMAGE": "debian:12-slim", "CUDA_SOURCE": "debian"}
IMAGE_LOCKS = ["torch", "runtime", "vllm"]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


content = load(ROOT / "roles/vllm_image/filter_plugins/vllm_image.py")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        # As debootstrap writes it, and as Docker's images have it.
        ("sources.list", "deb http://deb.debian.org/debian bookworm main\n"),
        (
            "sources.list.d/debian.sources",
            "Types: deb\nURIs: http://deb.debian.org/debian\nSuites: bookworm\nComponents: main\n",
        ),
    ],
)
def test_the_image_finds_the_sources_of_its_base(tmp_path, file, text):
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / file).write_text(text)
    dockerfile = (DOCKER / "Dockerfile").read_text().replace("\\\n", "")
    commands = re.findall(r"find /etc/apt/sources.*?{} \+", dockerfile)
    assert len(commands) == 2
    for command in commands:
        inside = command.replace("/etc/apt", str(tmp_path))
        environment = {"PATH": "/usr/bin:/bin", "DEBIAN_MIRROR": "http://mirror.test/"}
        subprocess.run(["sh", "-c", inside], env=environment, check=True)
    changed = (tmp_path / file).read_text()
    assert "main non-free\n" in changed
    assert "http://mirror.test/debian" in changed


@pytest.fixture
def source(tmp_path):
    copy = tmp_path / "vllm-k80-src"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))
    return copy


# ---- the tag


def test_the_tag_is_of_the_content_alone(source):
    tag = content.image_tag(source, BUILD_ARGS)
    assert re.fullmatch("[0-9a-f]{16}", tag)
    assert tag == content.image_tag(SOURCE, BUILD_ARGS)
    assert tag == content.image_tag(source, dict(reversed(BUILD_ARGS.items())))


@pytest.mark.parametrize(
    "path", ["vllm_k80/cli.py", "csrc/build.sh", "docker/Dockerfile", "docker/torch.lock"]
)
def test_the_tag_changes_with_every_file_that_enters_the_image(source, path):
    before = content.image_tag(source, BUILD_ARGS)
    (source / path).write_text((source / path).read_text() + "\n")
    assert content.image_tag(source, BUILD_ARGS) != before


def test_the_tag_changes_when_a_file_is_renamed(source):
    before = content.image_tag(source, BUILD_ARGS)
    (source / "vllm_k80/cli.py").rename(source / "vllm_k80/cli2.py")
    assert content.image_tag(source, BUILD_ARGS) != before


@pytest.mark.parametrize("name", BUILD_ARGS)
def test_the_tag_changes_with_every_build_argument(name):
    other = content.image_tag(SOURCE, BUILD_ARGS | {name: "another"})
    assert other != content.image_tag(SOURCE, BUILD_ARGS)


@pytest.mark.parametrize(
    "path",
    [
        "tests/test_new.py",
        "vllm_k80/__pycache__/cli.cpython-311.pyc",
        "vllm_k80/kernels/vllm_k80.fatbin",
        "docker/README.md",
        "docker/.env",
        "docker/test.lock",
    ],
)
def test_the_tag_ignores_what_does_not_enter_the_image(source, path):
    before = content.image_tag(source, BUILD_ARGS)
    (source / path).parent.mkdir(parents=True, exist_ok=True)
    (source / path).write_text("changed")
    assert content.image_tag(source, BUILD_ARGS) == before


def test_another_directory_is_refused_by_name(tmp_path):
    with pytest.raises(
        AnsibleFilterError, match=f"vllm_image_source: there is no .* in {tmp_path}"
    ):
        content.image_tag(tmp_path, BUILD_ARGS)


# ---- what is sent to Docker


def members(archive):
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(archive))) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_the_archive_is_what_was_hashed_and_always_the_same(source):
    archive = content.build_context(source)
    assert archive == content.build_context(SOURCE)
    files = members(archive)
    assert list(files) == list(content.content_files(source))
    assert files["docker/Dockerfile"] == (DOCKER / "Dockerfile").read_bytes()


def test_a_build_by_hand_takes_the_same_files():
    """docker/Dockerfile.dockerignore makes the choice that the role makes in Python."""
    ignore = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    hashed = {pattern.removesuffix("/**/*") for pattern in content.CONTENT}
    # The kernels are there when CUDA_SOURCE=host had them compiled; csrc and CUDA_SOURCE say which.
    assert allowed == hashed - {"docker/Dockerfile"} | {"kernels/vllm_k80.fatbin"}


def test_the_dockerfile_needs_nothing_that_is_not_sent():
    dockerfile = (DOCKER / "Dockerfile").read_text()
    wanted = set(re.findall(r"docker/\w+\.lock", dockerfile))
    assert wanted == {name for name in content.CONTENT if name.endswith(".lock")}


# ---- the locks


def locked(name):
    text = (DOCKER / f"{name}.lock").read_text()
    entries = re.findall(
        r"^(\S+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.M
    )
    # Nothing in the file that is not such an entry: no URL, no index, no package without a hash.
    assert "".join(f"{p}=={v} \\\n{hashes}" for p, v, hashes in entries) == text
    return {package: version for package, version, _ in entries}


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("name", sorted(path.stem for path in DOCKER.glob("*.in")))
def test_a_lock_holds_what_its_in_file_pins(name):
    lines = (DOCKER / f"{name}.in").read_text().splitlines()
    wanted = [re.match(r"([\w.-]+)(?:==(\S+))?", line).groups() for line in lines if line[0] != "#"]
    lock = locked(name)
    for package, version in wanted:
        assert lock[canonical(package)] == (version or lock[canonical(package)])
    if name in ("torch", "runtime", "vllm", "kernels"):  # installed with --no-deps
        assert set(lock) == {canonical(package) for package, _ in wanted}


def test_nothing_is_locked_twice_in_the_image():
    packages = [package for name in IMAGE_LOCKS for package in locked(name)]
    assert sorted(packages) == sorted(set(packages))


def test_what_the_card_cannot_use_stays_out():
    packages = {package for name in IMAGE_LOCKS for package in locked(name)}
    assert not packages & {"triton", "cmake", "ninja", "opencv-python-headless", "ray"}
    assert not [package for package in packages if package.endswith("-cu12")]


# ---- the build, followed

BUILD_LOG = """\
== the kernels, for sm_37, with /opt/nvcc
#9 [runtime 2/6] RUN echo "== PyTorch"     && pip install
#9 0.619 == PyTorch
#22 0.402 == the kernels, for sm_37
#22 1.7 rms_norm.cu: x == y
#9 DONE 68.6s
"""


@pytest.fixture
def build(monkeypatch):
    module = load(ROOT / "roles/vllm_image/action_plugins/vllm_image_build.py")
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    said = []
    action = object.__new__(module.ActionModule)
    action._host, action._log, action._say = "server", "/build.log", said.append
    action.said = said
    return action


def test_each_step_is_told_once(build):
    log = BUILD_LOG.splitlines(keepends=True)
    polls = iter([("active", 1), ("active", 3), ("active", 4), ("inactive", 6)])

    def execute(argv):
        if argv[0] == "systemctl":
            state, execute.lines = next(polls)
            return {"rc": 0, "stdout": f"Result=success\r\nActiveState={state}\r\n"}
        return {"rc": 0, "stdout": "".join(log[: execute.lines])}

    build._execute = execute
    assert build._follow("unit") == "success"
    assert build.said == [
        "the kernels, for sm_37, with /opt/nvcc",
        "PyTorch",
        "the kernels, for sm_37",
    ]


def test_a_command_that_fails_is_told_with_its_words(build):
    from ansible.errors import AnsibleActionFail

    build._execute = lambda argv: {"rc": 1, "stdout": "", "stderr": "no such unit\n"}
    with pytest.raises(
        AnsibleActionFail, match=r"systemctl show .* failed on server \(exit code 1\): no such unit"
    ):
        build._state("unit")


# ---- the kernels, compiled on the server


@pytest.mark.parametrize("nvcc", ["", "/opt/nvcc"])
def test_the_build_is_dockers_alone_unless_the_server_compiles(build, nvcc):
    ran, sent = [], []
    build._connection = SimpleNamespace(_shell=SimpleNamespace(join_path=posixpath.join))
    build._make_tmp_path = lambda: "/tmp/ansible"
    build._transfer_data = lambda path, data: sent.append(path)
    build._find_needle = lambda kind, name: f"{kind}/{name}"
    build._transfer_file = lambda source, path: sent.append(path)
    build._execute = build._command = ran.append
    args = {"context": "", "reference": "vllm-k80:1", "build_args": {"CUDA_SOURCE": "x"}}
    args |= {"log": "/build.log", "timeout": 9, "directory": "/build", "nvcc": nvcc}
    build._start("unit", args)

    docker = ["docker", "build", "--progress=plain", "--file=docker/Dockerfile"]
    docker += ["--tag=vllm-k80:1", "--build-arg=CUDA_SOURCE=x"]
    unit = ran[-1][ran[-1].index("--setenv=HOME=/root") + 1 :]
    assert "--property=StandardInput=file:/tmp/ansible/context.tar.gz" in ran[-1]
    if nvcc:
        assert unit == ["sh", "/tmp/ansible/compile-and-build", "/build", nvcc, *docker]
        assert sent == ["/tmp/ansible/context.tar.gz", "/tmp/ansible/compile-and-build"]
    else:
        assert unit == [*docker, "-"]


def test_the_server_compiles_and_docker_gets_the_result(tmp_path):
    """The script of the build, with a compiler and a Docker that only show what they were given."""
    nvcc, cuda = tmp_path / "nvcc", tmp_path / "cuda"
    cuda.mkdir()  # has its other programs, as where nvcc is a script that starts the real one
    nvcc.write_text(
        "#!/bin/sh\n"
        "[ $1 = --version ] && echo 'release 11.8, V11.8.89' && exit\n"
        f"[ $1 = --dryrun ] && echo '#$ _SPACE_= ' >&2 && echo '#$ PATH={cuda}:'$PATH >&2 && exit\n"
        "while [ $1 != -o ]; do shift; done\n"
        "grep -c __global__ $3 > $2\n"
    )
    nvcc.chmod(0o755)
    fatbinary = cuda / "fatbinary"
    fatbinary.write_text(
        "#!/bin/sh\n"
        "for word; do case $word in\n"
        "    --create=*) result=${word#*=} ;;\n"
        '    --image3=kind=*) parts="$parts ${word##*file=}" ;;\n'
        "esac; done\n"
        "cat $parts > $result\n"
    )
    fatbinary.chmod(0o755)
    context = tmp_path / "context"
    context.mkdir()
    (context / "left").write_text("by an earlier build")

    done = subprocess.run(
        [ROOT / "roles/vllm_image/files/compile-and-build", context, nvcc, "ls", "-1"],
        input=base64.b64decode(content.build_context(SOURCE)),
        capture_output=True,
        check=True,
    )
    first, *listed = done.stdout.decode().splitlines()
    assert first == f"== the kernels, for sm_37, with {nvcc}"
    assert {"csrc", "docker", "kernels", "vllm_k80"} <= set(listed)
    # All sources, as one, compiled for the K80 and as PTX.
    kernels = sum(path.read_text().count("__global__") for path in SOURCE.glob("csrc/*.cu"))
    assert (context / "kernels/vllm_k80.fatbin").read_text() == f"{kernels}\n" * 2
    assert not (context / "left").exists()
