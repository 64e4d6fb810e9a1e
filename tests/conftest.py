from __future__ import annotations

import os
import platform
from importlib import metadata

from hypothesis import HealthCheck, settings

settings.register_profile(
    "fast", max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "long", max_examples=1000, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("SEVLAB_HYPOTHESIS", "fast"))


def pytest_report_header() -> str:
    names = ("sevlab", "cryptography", "msgpack", "pluggy", "hypothesis", "atheris", "iced-x86", "unicorn")
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{name} -")
    profile = os.environ.get("SEVLAB_HYPOTHESIS", "fast")
    seed = "derandomized" if settings().derandomize else "random; a failure prints how to reproduce it"
    return f"python {platform.python_version()}, {', '.join(versions)}; hypothesis profile {profile} ({seed})"
