"""A virtual machine with soft-RoCE devices, for tests on machines without RDMA (`python -m tests.rdma.vm 'command'` runs one in it).

The guest's root is this machine's own, read only, with a writable layer in memory: its virtual environments work at their own paths,
and nothing that runs in the guest can change the host but what it writes into its output folder. Kernel and RDMA libraries
are Debian packages, downloaded and unpacked into a cache and never installed: with Debian's ibverbs-providers on the host every NIXL
process there would load UCX's EFA module, whose libraries make it crash at exit. Emulated without KVM, so that it runs wherever
qemu does: right for tests of function, useless for timing.
"""

from __future__ import annotations

import gzip
import importlib.util
import lzma
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

from platformdirs import user_cache_path

GUEST_INIT = Path(__file__).with_name("guest_init.sh")
CHECKOUT = Path(__file__).parents[2]
QEMU = "qemu-system-x86_64"
# The plain kernel: the one for clouds has neither rdma_rxe nor 9p.
KERNEL = "linux-image-amd64"
PACKAGES = (
    *("kmod", "busybox-static", "iproute2", "libibverbs1", "librdmacm1", "ibverbs-providers", "ibverbs-utils"),
    *("python3-pyverbs", "libnl-3-200", "libnl-route-3-200"),
)
EARLY_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_rng")
MEMORY_MB = 6144


class VmError(Exception):
    """The machine cannot be made or did not come up. The message says why."""


def why_not() -> str | None:
    """The reason why no such machine can run here, or None."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "the virtual machine needs Linux on x86-64"
    for tool, package in ((QEMU, "qemu-system-x86"), ("apt-get", "apt"), ("dpkg-deb", "dpkg")):
        if shutil.which(tool) is None:
            return f"there is no {tool} ({package} of Debian or Ubuntu)"
    if sys.version_info[:2] != (3, 11):
        return "Debian 12's pyverbs is for Python 3.11"
    return None


class Vm:
    """Kernel, libraries and first file system of the guest, made once under `folder`."""

    def __init__(self, folder: Path | None = None) -> None:
        default = os.environ.get("DUALPATH_TEST_VM_DIR")
        self.folder = folder or (Path(default) if default else user_cache_path("dualpath-ray") / "rdma-vm")
        self.kernel = self.folder / "vmlinux"
        self.first_files = self.folder / "initrd.gz"
        self.modules = self.folder / "kernel"
        self.libraries = self.folder / "libraries"

    def prepare(self) -> None:
        """Download and unpack what is missing (90 MB). Raises VmError."""
        if self.first_files.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            self._unpack(Path(scratch))
        version = next((self.modules / "lib/modules").iterdir()).name
        self._kmod("depmod", "-b", str(self.modules), version)
        self.kernel.write_bytes(uncompressed_kernel((self.modules / f"boot/vmlinuz-{version}").read_bytes()))
        self._make_first_files(version)

    def run(self, command: str, output: Path, timeout_s: float) -> int:
        """Boot, run a shell command in the guest, power off; returns its exit code. It sees `output` as /out. Raises VmError."""
        self.prepare()
        output.mkdir(parents=True, exist_ok=True)
        (output / "exit_code").unlink(missing_ok=True)
        (output / "command.sh").write_text(command + "\n", encoding="utf-8")
        log = output / "console.log"
        with log.open("wb") as file:
            process = subprocess.Popen(self._qemu(output), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                raise VmError(f"the guest did not end within {timeout_s:.0f} s: {tail(log)}") from None
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
        try:
            return int((output / "exit_code").read_text(encoding="ascii"))
        except (OSError, ValueError):
            raise VmError(f"the guest gave no exit code (qemu: {process.returncode}): {tail(log)}") from None

    def _qemu(self, output: Path) -> list[str]:
        # Left to calibrate its clock under load, a guest was seen to run three times too fast.
        khz = next(
            (int(line.split(":")[1].replace(".", "")) for line in Path("/proc/cpuinfo").read_text().splitlines() if "cpu MHz" in line), 0
        )
        words = [
            "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off nokaslr no_timer_check tsc=reliable audit=0 net.ifnames=0",
            f"tsc_early_khz={khz}" if khz else "",
            f"guest.init={GUEST_INIT} guest.modules={self.modules} guest.nixl={nixl_libraries()} guest.checkout={CHECKOUT}",
        ]
        command = [QEMU, "-accel", "tcg,thread=multi,tb-size=1024", "-cpu", "max", "-M", "q35", "-smp", "2", "-m", str(MEMORY_MB)]
        command += ["-display", "none", "-serial", "stdio", "-monitor", "none", "-no-reboot", "-nodefaults", "-net", "none"]
        command += ["-kernel", str(self.kernel), "-initrd", str(self.first_files), "-append", " ".join(words)]
        command += ["-object", "rng-random,id=r0,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=r0"]
        for tag, path, read_only in (("hostroot", Path("/"), True), ("libraries", self.libraries, True), ("out", output, False)):
            options = ",readonly=on" if read_only else ""
            command += ["-fsdev", f"local,id={tag},path={path},security_model=none,multidevs=remap{options}"]
            command += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
        return command

    def _unpack(self, scratch: Path) -> None:
        found = run(["apt-cache", "depends", KERNEL]).stdout
        image = next((line.split()[-1] for line in found.splitlines() if "Depends: linux-image-" in line), None)
        if image is None:
            raise VmError(f"apt knows no {KERNEL}: run apt-get update")
        run(["apt-get", "-q", "download", image, *PACKAGES], cwd=scratch)
        for folder in (self.modules, self.libraries):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        for package in scratch.glob("*.deb"):
            run(["dpkg-deb", "-x", str(package), str(self.modules if package.name.startswith("linux-image") else self.libraries)])
        # Where /usr is merged, folders here would hide the links /bin, /lib, ... in the guest's layered root.
        for name in ("bin", "sbin", "lib", "lib64"):
            folder = self.libraries / name
            if folder.is_dir():
                shutil.copytree(folder, self.libraries / "usr" / name, symlinks=True, dirs_exist_ok=True)
                shutil.rmtree(folder)

    def _kmod(self, tool: str, *arguments: str) -> str:
        """kmod does the work of modprobe and depmod when it is called by their names."""
        link = self.folder / tool
        if not link.is_symlink():
            link.symlink_to(self.libraries / "usr/bin/kmod")
        return run([str(link), *arguments]).stdout

    def _make_first_files(self, version: str) -> None:
        """The initial file system: busybox, and the modules that reach the shared root."""
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            root = Path(scratch)
            for name in ("bin", "modules", "proc", "sys", "dev", "host", "layer", "root", "libraries"):
                (root / name).mkdir()
            shutil.copy2(next(self.libraries.glob("usr/bin/busybox")), root / "bin/busybox")
            order: list[str] = []
            for module in EARLY_MODULES:
                listed = self._kmod("modprobe", "-d", str(self.modules), "-S", version, "--show-depends", module)
                for path in (Path(line.split()[1]) for line in listed.splitlines() if line.startswith("insmod")):
                    if path.name not in order:
                        order.append(path.name)
                        shutil.copy2(path, root / "modules")
            (root / "modules/order").write_text("\n".join(order) + "\n", encoding="ascii")
            shutil.copy2(GUEST_INIT.with_name("first_init.sh"), root / "init")
            (root / "init").chmod(0o755)
            names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*"))) + "\n"
            archive = run([str(root / "bin/busybox"), "cpio", "-o", "-H", "newc"], cwd=root, input=names.encode(), text=False).stdout
            self.first_files.write_bytes(gzip.compress(archive, 1))


def nixl_libraries() -> Path:
    """Where the NIXL wheel keeps the libraries that it brings."""
    spec = importlib.util.find_spec("nixl_cu12")
    if spec is None or spec.origin is None:
        raise VmError("nixl-cu12 is not installed")
    return Path(spec.origin).parent.with_name("nixl_cu12.libs")


def uncompressed_kernel(image: bytes) -> bytes:
    """The ELF file inside a bzImage, which boots seconds earlier than unpacking it under emulation."""
    start = (image[0x1F1] + 1) * 512
    offset, length = struct.unpack_from("<II", image, 0x248)
    payload = image[start + offset : start + offset + length]
    if payload.startswith(b"\xfd7zXZ\0"):
        kernel = lzma.LZMADecompressor(format=lzma.FORMAT_XZ).decompress(payload)
    elif payload.startswith(b"\x1f\x8b"):
        kernel = zlib.decompressobj(31).decompress(payload)
    elif payload.startswith(b"\x28\xb5\x2f\xfd") and shutil.which("zstd"):
        kernel = run(["zstd", "-dc"], input=payload[:-4], text=False).stdout
    else:
        raise VmError("the kernel is compressed in a way that this script does not know")
    if not kernel.startswith(b"\x7fELF"):
        raise VmError("no kernel in the kernel package")
    return kernel


def run(command: list[str], check: bool = True, text: bool = True, **options: object) -> subprocess.CompletedProcess:  # type: ignore[type-arg]
    """A command of the setup. Raises VmError."""
    done = subprocess.run(command, capture_output=True, text=text, check=False, **options)  # type: ignore[call-overload]
    if check and done.returncode:
        raise VmError(f"{' '.join(command[:4])} ... failed: {done.stderr[-500:]}")
    return done


def tail(log: Path) -> str:
    return log.read_bytes()[-2000:].decode(errors="replace")


def main() -> int:
    reason = why_not()
    if reason is not None:
        raise SystemExit(reason)
    output = Path(tempfile.mkdtemp(prefix="rdma-vm-"))
    try:
        code = Vm().run(sys.argv[1], output, float(os.environ.get("DUALPATH_TEST_VM_TIMEOUT_S", "600")))
        print((output / "console.log").read_text(errors="replace"))
    except VmError as error:
        raise SystemExit(str(error)) from error
    finally:
        shutil.rmtree(output, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
