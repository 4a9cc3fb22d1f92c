"""One distribution, two import packages, and a native CPU library that CMake builds.

Without CMake or a C++ compiler the installation succeeds all the same: the reason is printed and left beside the package,
where lightningdit_kernels.backends() finds it.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DALI = "nvidia-dali-cuda130>=2.4; platform_system == 'Linux'"  # its CPU operators need no GPU
EVALUATION = ["torch-fidelity>=0.4", "lpips>=0.1.4", "timm>=1.0.20", "torchvision", "diffusers>=0.35"]
DEMO = ["gradio>=6"]
TEST = ["pytest>=8.0", "pytest-xdist>=3.5", "hypothesis>=6.100", "torchao>=0.18"]
MISSING = "native_missing.txt"  # the name that lightningdit_kernels/native.py reads


class BuildNative(build_ext):
    """Installs liblightningdit_kernels into the package, or the reason why there is none."""

    def run(self):
        package = ROOT / "kernels" / "lightningdit_kernels" if self.inplace else Path(self.build_lib).resolve() / "lightningdit_kernels"
        package.mkdir(parents=True, exist_ok=True)
        for stale in (package / MISSING, *package.glob("liblightningdit_kernels.*")):
            stale.unlink(missing_ok=True)
        reason = build_native(package)
        if reason:
            (package / MISSING).write_text(f"{reason} when lightningdit was installed\n")
            advice = "On CPU every op will use its plain PyTorch definition: slower, otherwise the same."
            print(f"lightningdit: no native CPU kernels: {reason}. {advice}", file=sys.stderr)

    def get_outputs(self):
        package = Path(self.build_lib) / "lightningdit_kernels"
        return [str(path) for path in (package / MISSING, *package.glob("liblightningdit_kernels.*")) if path.is_file()]

    def get_output_mapping(self):
        return {}  # an editable installation builds straight into the source tree


def build_native(package: Path) -> str:
    """Builds with CMake and installs into `package`. Returns "" or what was missing; the compiler's output goes to stdout (pip -v)."""
    path = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    cmake, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
    if not cmake:
        return "CMake was not found"
    # A folder of its own each time: CMake remembers paths of pip's isolated environment, which is gone at the next build.
    with tempfile.TemporaryDirectory() as build:
        configure = [cmake, "-S", str(ROOT), "-B", build, "-DCMAKE_BUILD_TYPE=Release"]
        if ninja:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        for step in (configure, [cmake, "--build", build, "--config", "Release"], [cmake, "--install", build, "--prefix", str(package)]):
            done = subprocess.run(step, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False)
            print(done.stdout)
            if done.returncode:
                if step is configure and "CMAKE_CXX_COMPILER" in done.stdout:
                    return "no working C++ compiler was found"
                return f"{' '.join(step[:2])} failed (pip install -v shows why)"
    return ""


setup(
    name="lightningdit",
    version="0.1.0",
    description="VA-VAE and LightningDiT, fast: tokenizer, diffusion transformer, the kernels under both",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["lightningdit", "lightningdit.*"]), "lightningdit_kernels"],
    package_dir={"lightningdit_kernels": "kernels/lightningdit_kernels"},
    package_data={"lightningdit": ["assets/*.safetensors"]},
    ext_modules=[Extension("lightningdit_kernels.liblightningdit_kernels", sources=[])],
    cmdclass={"build_ext": BuildNative},
    entry_points={"console_scripts": ["lightningdit = lightningdit.cli:main"]},
    install_requires=[
        # Of torch and triton the least versions, which `make test` tests (constraints.txt); `make test-newest` tests the newest ones. Of
        # the others both have recent versions: the least ones are those whose interfaces are used, and are not tested.
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=1.26",
        "safetensors>=0.4",
        "pyyaml>=6.0",
        "tyro>=0.9",
        "tqdm>=4.60",
        "pillow>=10.0",
        "scikit-learn>=1.4",
        "matplotlib>=3.8",
        "tensorboard>=2.16",
        "torchdiffeq>=0.2.4",
    ],
    extras_require={
        "dali": [DALI],
        "eval": EVALUATION,
        "peers": ["xformers", "liger-kernel[cutedsl]>=0.8.3", "quack-kernels", "flash-attn-4>=4.0.0b36"],
        "demo": DEMO,
        "test": TEST,
        "dev": [*TEST, "pytest-benchmark>=5.0", "ruff>=0.8", "selenium>=4.20", DALI, *EVALUATION, *DEMO],
    },
)
