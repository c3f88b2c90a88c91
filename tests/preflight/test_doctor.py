"""doctor finds what is wrong with a machine, says what to do, and never falls over itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from tunesmith import events
from tunesmith.errors import SetupError
from tunesmith.machine import backend
from tunesmith.preflight import doctor as preflight


def found(name: str, checks: list[preflight.Check]) -> preflight.Check:
    return next(check for check in checks if check["name"] == name)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(backend, "gflops", lambda: 100.0)
    monkeypatch.setattr(preflight, "WRITTEN", 1 << 20)


def test_a_sound_machine(tmp_path, monkeypatch):
    told: list[events.Event] = []
    result = preflight.doctor(tmp_path / "not" / "there" / "yet", overfit=False, notify=told.append)
    checks = result["checks"]
    names = {
        "python",
        "tunesmith",
        "mlx",
        "mlx-lm",
        "transformers",
        "device",
        "memory",
        "swap",
        "disk",
        "write speed",
    }
    assert names <= {check["name"] for check in checks}
    assert all(set(check) == {"name", "status", "value", "hint"} for check in checks)
    assert found("python", checks)["value"] == sys.version.split()[0]
    assert str(tmp_path) in found("disk", checks)["value"] and "B/s" in found("write speed", checks)["value"]
    assert "100 GFLOP/s" in found("products", checks)["value"]
    assert result["ok"] == all(check["status"] != "fail" for check in checks)
    assert [event.what for event in told if isinstance(event, events.Notice)][:2] == [
        "looking at versions",
        "looking at device",
    ]
    assert list(tmp_path.iterdir()) == []


def test_the_overfit_reaches_the_known_loss():
    result = found("overfit", preflight.doctor(overfit=True)["checks"])
    assert result["status"] == "ok", result
    assert result["value"].startswith("loss 4.")


@pytest.mark.parametrize(("last", "status"), [(0.99, "ok"), (1.01, "fail"), (float("nan"), "fail")])
def test_an_overfit_that_stops_short_fails(monkeypatch, last, status):

    monkeypatch.setattr(preflight, "_overfit_probe", lambda: (4.2, last))
    result = preflight.doctor()
    check = found("overfit", result["checks"])
    assert check["status"] == status and (check["hint"] is None) == (status == "ok")
    assert result["ok"] == (status == "ok")


def test_slow_products_and_a_missing_blas_are_warned_about(monkeypatch):
    device = backend.Device("chip", "cpu", "reference", "install a BLAS", ("a note",))
    monkeypatch.setattr(backend, "setup", lambda: device)
    checks = preflight.doctor(overfit=False)["checks"]
    assert found("products", checks) == {
        "name": "products",
        "status": "warn",
        "value": "100 GFLOP/s float32; BLAS reference, freed memory kept",
        "hint": "install a BLAS",
    }
    assert {"name": "device", "status": "warn", "value": "a note", "hint": None} in checks
    monkeypatch.setattr(backend, "setup", lambda: backend.Device("chip", "cpu", "openblas", None, ()))
    monkeypatch.setattr(backend, "gflops", lambda: 3.0)
    assert found("products", preflight.doctor(overfit=False)["checks"])["status"] == "warn"


def test_what_the_environment_slows_down_or_misspells_is_told(monkeypatch):
    monkeypatch.setattr(backend, "setup", lambda: backend.Device("chip", "cpu", "openblas", None, ()))
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    check = found("products", preflight.doctor(overfit=False)["checks"])
    assert check["status"] == "warn" and "OPENBLAS_CORETYPE=Haswell" in str(check["hint"])
    monkeypatch.delenv("OPENBLAS_CORETYPE")
    assert found("products", preflight.doctor(overfit=False)["checks"])["status"] == "ok"
    for name in ("MLX_HOSTFILE", "MLX_RANK", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    for value, told in (("on", 0), ("operations", 0), ("off", 0), ("OFF", 1), ("0", 1)):
        monkeypatch.setenv("TUNESMITH_KERNELS", value)
        assert len(backend._odd_switches()) == told
    monkeypatch.setenv("TUNESMITH_KERNELS", "off")
    monkeypatch.setenv("MLX_HOSTFILE", "hosts.json")
    assert "MLX_RANK is not" in backend._odd_switches()[0]


@pytest.mark.parametrize(
    "error", [SetupError("no MLX", hint="pip install"), OSError("bad ELF"), RuntimeError("?")]
)
def test_a_broken_mlx_is_a_failed_check(monkeypatch, error):
    def broken() -> backend.Device:
        raise error

    monkeypatch.setattr(backend, "setup", broken)
    result = preflight.doctor()
    failed = {check["name"]: check for check in result["checks"] if check["status"] == "fail"}
    assert {"device", "products", "overfit"} <= set(failed) and not result["ok"]
    assert all(str(error).splitlines()[0] in check["value"] and check["hint"] for check in failed.values())
    assert found("disk", result["checks"])["status"] != "fail"


def test_it_runs_where_mlx_cannot_be_imported(tmp_path):
    code = (
        "import sys; sys.modules['mlx'] = sys.modules['mlx.core'] = None\n"
        "from pathlib import Path; from tunesmith.preflight import doctor as preflight\n"
        f"print(preflight.render(preflight.doctor(Path({str(tmp_path)!r}))['checks']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "FAIL  device " in done.stdout and "MLX cannot be loaded" in done.stdout
    assert "this machine cannot train yet" in done.stdout


def test_a_folder_that_cannot_take_runs_fails(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    result = preflight.doctor(tmp_path / "file", overfit=False)
    assert found("disk", result["checks"])["status"] == "fail"

    def refuse(**_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(preflight.tempfile, "TemporaryFile", refuse)
    check = found("write speed", preflight.doctor(tmp_path, overfit=False)["checks"])
    assert check["status"] == "fail" and "read-only" in check["value"]


def test_a_full_disk_is_not_filled_further(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    monkeypatch.setattr(
        preflight.tempfile, "TemporaryFile", lambda **_: pytest.fail("written to a full disk")
    )
    checks = preflight.doctor(tmp_path, overfit=False)["checks"]
    assert found("disk", checks)["status"] == "warn" and found("write speed", checks)["status"] == "fail"


@pytest.mark.parametrize(
    ("limit", "value"),
    [("8000000000", "8.00 GB in all (limit of this container), 5.50 GB free"), ("max", None)],
)
def test_the_limit_of_a_container_counts(monkeypatch, limit, value):
    import psutil

    files = {
        "memory.max": limit,
        "memory.current": "3000000000",
        "memory.stat": "anon 1\ninactive_file 500000000\n",
    }
    monkeypatch.setattr(Path, "read_text", lambda self, *_, **__: files[self.name])
    host = type("Memory", (), {"total": 64_000_000_000, "available": 60_000_000_000})()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: host)
    assert found("memory", preflight._memory())["value"] == (value or "64.00 GB in all, 60.00 GB free")


@pytest.mark.skipif(sys.platform != "linux", reason="MLX needs g++ on Linux only")
def test_a_missing_compiler_is_warned_about(monkeypatch):
    if backend.setup().kind == "gpu":
        pytest.skip("MLX needs g++ on the CPU only")
    import mlx.core as mx

    monkeypatch.setattr(backend, "setup", backend.setup.__wrapped__)  # without its cache
    monkeypatch.setattr(mx, "disable_compile", lambda: None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    checks = preflight.doctor(overfit=False)["checks"]
    assert any(check["status"] == "warn" and "g++" in check["value"] for check in checks)


def test_a_package_that_is_missing_fails(monkeypatch):
    monkeypatch.setattr(preflight, "PACKAGES", ("no-such-package",))
    result = preflight.doctor(overfit=False)
    check = found("no-such-package", result["checks"])
    assert check == {
        "name": "no-such-package",
        "status": "fail",
        "value": "not installed",
        "hint": "pip install no-such-package",
    }
    assert not result["ok"]


def test_the_table_is_aligned_and_shows_hints():
    table = preflight.render(
        [
            {"name": "a", "status": "ok", "value": "one\ntwo", "hint": None},
            {"name": "longer", "status": "fail", "value": "bad", "hint": "mend it"},
        ]
    )
    assert table.splitlines() == [
        "ok    a       one",
        "              two",
        "FAIL  longer  bad",
        "              hint: mend it",
        "",
        "this machine cannot train yet: 1 ok, 0 to look at, 1 failed",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="the BLAS of Linux")
def test_a_blas_from_the_package_registry_is_found_where_the_linker_does_not_look(monkeypatch, tmp_path):
    (tmp_path / "lib").mkdir()
    real = next((path for path in Path("/usr/lib").glob("*/libm.so.6")), None)
    if real is None:
        pytest.skip("no libm.so.6 under /usr/lib to stand for a library")
    (tmp_path / "lib" / "libmkl_rt.so.3").symlink_to(real)
    monkeypatch.setattr(backend, "BLAS_CANDIDATES", ("libabsent.so.0",))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(backend, "_opened", [])
    monkeypatch.delenv("TUNESMITH_BLAS", raising=False)
    assert backend._open_blas() == (str(tmp_path / "lib" / "libmkl_rt.so.3"), None)
    monkeypatch.setattr(sys, "prefix", "/nowhere")
    assert backend._open_blas() == ("reference", backend.BLAS_HINT)


def test_the_kernels_of_a_model_are_listed(tiny_model):
    checks = preflight.doctor(model=str(tiny_model), overfit=False)["checks"]
    assert found("kernels", checks)["status"] == "ok"
    check = found("model", checks)
    assert check["status"] == "ok"
    assert check["value"].startswith("RMSNorm, SwiGLU, attention, cross-entropy, few rows, rotary: compiled")


def test_an_attention_that_the_kernels_do_not_cover_is_told(tiny_model, monkeypatch):
    from tunesmith.model import kernels

    compiled, half = kernels._compiled, mx.zeros(1, mx.float16)

    def without_attention(name, *arrays):
        return compiled(name, half) if name == "attention" else compiled(name, *arrays)

    monkeypatch.setattr(kernels, "_compiled", without_attention)  # in half precision it is not covered
    check = found("model", preflight.doctor(model=str(tiny_model), overfit=False)["checks"])
    assert check["status"] == "warn" and "attention: MLX's" in check["value"]


def test_a_missing_compiler_is_told(monkeypatch):
    from tunesmith.model.kernels import extension

    absent = extension.Extension(None, "no C++ compiler (g++)", "apt-get install g++")
    monkeypatch.setattr(extension, "load", lambda notify=None: absent)
    check = found("kernels", preflight.doctor(overfit=False)["checks"])
    assert check["status"] == "warn" and check["hint"] == "apt-get install g++"
    assert check["value"] == "as operations of MLX (no C++ compiler (g++))"
