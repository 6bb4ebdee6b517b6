"""What every test shares: no network, a fixed seed, and a small Vision Transformer; and the table of faults."""

import os
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch
from torch import nn

if not torch.cuda.is_available():
    # Triton reads this once, when it is imported; without a card its interpreter runs the kernels.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples each time, however busy the machine is; --hypothesis-profile=default looks for new ones.
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def vit() -> nn.Module:
    """A timm Vision Transformer: 3 blocks of width 32 on 16 x 16 px, 4 patches and a class token."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    return timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5
    ).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", type=Path, help="write what tests marked as faults injected, and what came of it")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--fault-table")
    if path and not hasattr(config, "workerinput"):  # of several processes, the one that hears of all tests
        config.pluginmanager.register(FaultTable(path))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    mark = item.get_closest_marker("fault")
    if mark and (report.when == "call" or report.outcome != "passed"):
        injected, expected = mark.args
        if parameters := getattr(item, "callspec", None):
            injected = injected.format(**{"case": parameters.id, **parameters.params})
        # One test may inject a fault many times.
        times = dict(item.user_properties).get("times", 1)
        report.user_properties.append(("fault", (injected, expected, times)))
    return report


class FaultTable:
    """What was broken on purpose, how often, and whether what must happen did; written when all tests are over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for injected, expected, times in (value for name, value in report.user_properties if name == "fault"):
            self.outcomes[injected, expected][report.outcome] += times

    def pytest_sessionfinish(self) -> None:
        lines = ["| injected | what must happen | times | it happened |", "|---|---|---|---|"]
        for (injected, expected), outcomes in sorted(self.outcomes.items()):
            held = "yes" if set(outcomes) == {"passed"} else f"**{dict(outcomes)}**"
            injected = injected.replace("|", "\\|")
            lines.append(f"| {injected} | {expected} | {sum(outcomes.values())} | {held} |")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("# Faults\n\nMade by `make faults`.\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered from one test to the next, nor in the user's home."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
