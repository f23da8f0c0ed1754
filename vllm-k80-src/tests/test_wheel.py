"""The wheel: with CUDA 11's compiler, with kernels made before, and with neither."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent
sys.path.insert(0, str(SOURCE / "tools"))

import kernels_report  # noqa: E402

pytestmark = pytest.mark.wheel

KERNELS = "vllm_k80/kernels/vllm_k80.fatbin"


@pytest.fixture(scope="module")
def nvcc() -> Path:
    try:
        return Path(kernels_report.find_nvcc(os.environ.get("NVCC"))[0])
    except kernels_report.ReportError as error:
        pytest.skip(f"the kernels cannot be compiled here: {error}")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy whose kernels are the norms alone, which compile in two seconds."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("CMakeLists.txt", "README.md", "pyproject.toml", "vllm_k80.pth"):
        shutil.copy(SOURCE / name, copy)
    ignore = shutil.ignore_patterns("__pycache__", "*.fatbin")
    shutil.copytree(SOURCE / "vllm_k80", copy / "vllm_k80", ignore=ignore)
    (copy / "csrc").mkdir()
    for name in ("build.sh", "rms_norm.cu"):
        shutil.copy(SOURCE / "csrc" / name, copy / "csrc")
    return copy


@pytest.fixture
def bare_path(tmp_path: Path) -> str:
    """A PATH with what csrc/build.sh calls and no compiler of any kind."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for tool in ("cat", "dirname", "mkdir", "rm", "sed", "sh", "tr"):
        (directory / tool).symlink_to(shutil.which(tool) or tool)
    return str(directory)


def stand_in(directory: Path, release: str) -> Path:
    """An nvcc that only says of which CUDA it is."""
    nvcc = directory / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    return nvcc


def pip(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run pip as the image's build does: no index, and the back end of this environment."""
    kept = {"PATH": os.environ["PATH"], "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        env=kept | {"PIP_CONFIG_FILE": os.devnull} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def build(source: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["wheel", "--verbose", "--no-index", "--no-deps", "--no-build-isolation"]
    return pip(*command, "--wheel-dir", source.parent / "out", *options, source, **environment)


def wheel(source: Path, *options: str, **environment: str) -> Path:
    """Build it; the path of the one wheel."""
    done = build(source, *options, **environment)
    assert done.returncode == 0, done.stdout
    (made,) = (source.parent / "out").iterdir()
    assert made.name.endswith("-py3-none-any.whl")
    return made


def a_clean_environment(tmp_path: Path) -> Path:
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    return environment


def code(nvcc: Path, binary: Path) -> list[str]:
    """Of a fat binary, what it is for: sm_37.cubin and sm_37.ptx, say."""
    cuobjdump = nvcc.with_name("cuobjdump")
    listed = [
        subprocess.run([cuobjdump, option, binary], capture_output=True, text=True, check=True)
        for option in ("--list-elf", "--list-ptx")
    ]
    return re.findall(r"\.(sm_\w+\.\w+)$", "".join(done.stdout for done in listed), re.MULTILINE)


def test_it_serves_in_a_clean_environment_with_the_kernels_in_it(
    nvcc: Path, tmp_path: Path, bare_path: str
) -> None:
    """All kernels, from the sources as they lie here, for the card and as PTX; 20 s."""
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.fatbin", "build", "results")
    shutil.copytree(SOURCE, source, ignore=ignore)
    made = wheel(source, NVCC=str(nvcc))

    environment = a_clean_environment(tmp_path)
    python = environment / "bin" / "python"
    done = pip("--python", python, "install", "--no-index", "--no-deps", made)
    assert done.returncode == 0, done.stdout

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env={"PATH": bare_path}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert run(environment / "bin" / "vllm-k80", "--version") == "vllm-k80 0.1.0"
    # By the .pth file at the top of site-packages, before anybody imports it.
    assert run(python, "-c", "import sys; print('vllm_k80._boot' in sys.modules)") == "True"
    package = Path(run(python, "-c", "import vllm_k80; print(vllm_k80.__path__[0])"))
    binary = package.parent / KERNELS
    assert code(nvcc, binary) == ["sm_37.cubin", "sm_37.ptx"]
    usage = kernels_report.run(nvcc.with_name("cuobjdump"), "--dump-resource-usage", binary)
    names = set(kernels_report.resources(usage))
    assert {"rms_norm_f32", "gemv_w4_f16_m1", "paged_attention_f16_d128_h4"} <= names


def test_other_capabilities_and_the_compiler_of_a_cuda_directory(
    nvcc: Path, source: Path, tmp_path: Path
) -> None:
    """CUDA_HOME names the compiler, whatever PATH finds; VLLM_K80_CUDA_ARCHS what it is for."""
    path = f"{stand_in(tmp_path / '13', '13.0').parent}:{os.environ['PATH']}"
    home = str(nvcc.parent.parent)
    made = wheel(source, PATH=path, CUDA_HOME=home, VLLM_K80_CUDA_ARCHS="3.5 3.7")
    with zipfile.ZipFile(made) as archive:
        binary = Path(archive.extract(KERNELS, tmp_path))
    assert sorted(code(nvcc, binary)) == ["sm_35.cubin", "sm_35.ptx", "sm_37.cubin", "sm_37.ptx"]


def test_without_a_compiler_it_has_references_only_and_the_build_says_so(
    source: Path, bare_path: str
) -> None:
    # Kernels that were left in the sources might be of other sources: they stay out.
    (source / "vllm_k80" / "kernels").mkdir()
    (source / KERNELS).write_bytes(b"of last year")
    done = build(source, PATH=bare_path)
    assert done.returncode == 0, done.stdout
    said = [line for line in done.stdout.splitlines() if "no nvcc here" in line]
    assert len(said) == 1
    assert "no kernels, only their references" in said[0]
    (made,) = (source.parent / "out").iterdir()
    with zipfile.ZipFile(made) as archive:
        names = archive.namelist()
    assert {"vllm_k80/cli.py", "vllm_k80/costs.json", "vllm_k80.pth"} <= set(names)
    assert not [name for name in names if "kernels/" in name or name.startswith("csrc")]


def test_kernels_made_before_are_taken_and_nothing_is_compiled(
    source: Path, tmp_path: Path, bare_path: str
) -> None:
    """As in the image's build, which has csrc and the compiler in a stage of their own."""
    shutil.rmtree(source / "csrc")
    (tmp_path / "made.fatbin").write_bytes(b"kernels")
    option = f"--config-settings=cmake.define.VLLM_K80_FATBIN={tmp_path / 'made.fatbin'}"
    made = wheel(source, option, PATH=bare_path)
    with zipfile.ZipFile(made) as archive:
        assert archive.read(KERNELS) == b"kernels"


def test_an_editable_installation_is_the_sources_and_compiles_nothing(
    source: Path, tmp_path: Path
) -> None:
    """As tools/package-env makes it, but where pip builds for itself."""
    python = a_clean_environment(tmp_path) / "bin" / "python"
    backend = next(path for path in sys.path if (Path(path) / "scikit_build_core").is_dir())
    command = ["install", "--no-index", "--no-deps", "--no-build-isolation", "--editable"]
    nvcc = stand_in(tmp_path / "13", "13.0")  # would be refused
    done = pip("--python", python, *command, source, PYTHONPATH=backend, NVCC=str(nvcc))
    assert done.returncode == 0, done.stdout
    assert not [*source.rglob("CMakeCache.txt")]
    (source / "vllm_k80" / "new.py").write_text("")
    program = "import sys, vllm_k80.new; print('vllm_k80._boot' in sys.modules, vllm_k80.__file__)"
    said = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["True", str(source / "vllm_k80" / "__init__.py")]


@pytest.mark.parametrize(
    ("environment", "option", "said"),
    [
        ({"NVCC": "{tmp}/13/bin/nvcc"}, "", r"/13/bin/nvcc is of CUDA 13; the K80 needs a CUDA 11"),
        ({"CUDA_HOME": "{tmp}/13"}, "", r"/13/bin/nvcc is of CUDA 13; the K80 needs a CUDA 11"),
        ({"PATH": "{tmp}/13/bin:{bare}"}, "", r"nvcc is of CUDA 13; the K80 needs a CUDA 11"),
        ({"CUDA_HOME": "{tmp}/gone"}, "", r"there is no \S+/gone/bin/nvcc; name a CUDA 11"),
        ({}, "VLLM_K80_FATBIN={tmp}/gone", r"VLLM_K80_FATBIN: there is no \S+/gone"),
    ],
)
def test_a_compiler_that_does_not_know_the_card_is_refused_in_words(
    source: Path,
    tmp_path: Path,
    bare_path: str,
    environment: dict[str, str],
    option: str,
    said: str,
) -> None:
    stand_in(tmp_path / "13", "13.0")
    names = {"tmp": tmp_path, "bare": bare_path}
    given = {"PATH": bare_path} | {k: v.format(**names) for k, v in environment.items()}
    options = [f"--config-settings=cmake.define.{option.format(**names)}"] if option else []
    done = build(source, *options, **given)
    assert done.returncode != 0
    assert re.search(said, " ".join(done.stdout.split())), done.stdout
    assert "Traceback" not in done.stdout
