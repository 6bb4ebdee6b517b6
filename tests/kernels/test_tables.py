"""Which tile and which form a call takes: from the defaults, from what ships, from the user's own file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import mor_kernels
from mor_kernels import blocks, tables
from mor_kernels.blocks import Blocks
from mor_kernels.tables import Forms, Table

GPU = "Some GPU 80GB"
TILE = {
    "kernel": "branch", "elements": "16-bit", "below_rows": 4096,
    "rows": 32, "inner": 64, "columns": 64, "warps": 4, "stages": 2,
}  # fmt: skip
FORM = {
    "dtype": "bfloat16", "K": 768, "O": 3072, "below_rows": None,
    "forward": "tail", "backward": "branch", "torch_wins": True,
}  # fmt: skip


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> torch.device:
    """A card that nobody has heard of, and no tables that ship."""
    monkeypatch.setattr(tables, "card", lambda device: (GPU, (9, 0)))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path)
    monkeypatch.delenv(tables.VARIABLE, raising=False)
    tables.table_of.cache_clear()
    yield torch.device("cuda", 0)
    tables.table_of.cache_clear()


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[object], Path]:
    """Puts this content into the file that MOR_KERNELS_TABLE names."""

    def put(content: object) -> Path:
        path = tmp_path / "own" / "table.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setenv(tables.VARIABLE, str(path))
        tables.table_of.cache_clear()
        return path

    return put


def fake(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """On a card as far as anybody can tell, but without data: whoever looks into it gets an error."""
    with FakeTensorMode():
        return torch.empty(rows, width, dtype=dtype, device="cuda")


def test_an_unknown_card_gets_the_defaults_and_the_safe_form(card):
    assert tables.table_of(card) == Table(blocks.default_tiles((9, 0)), {})
    assert tables.choose_forms(fake(65536, 768), 3072) == Forms("branch", "branch", False)
    assert not mor_kernels.prefers_library(card, torch.bfloat16, 768, 3072, 65536)


def test_the_defaults_have_a_tile_for_everything():
    every = {(k, kind, bucket) for k in blocks.KERNELS for kind in blocks.KINDS for bucket in blocks.ROW_BUCKETS}
    for capability in (None, (8, 0), (9, 0), (10, 0), (12, 0)):
        assert blocks.default_tiles(capability).keys() == every


@pytest.mark.parametrize(("rows", "bucket"), [(0, 4096), (4095, 4096), (4096, 8192), (32767, 32768), (32768, None)])
def test_bucket_of(rows, bucket):
    assert blocks.row_bucket(rows) == bucket


def test_the_sizes_that_matter_fall_into_different_buckets():
    assert len({blocks.row_bucket(rows) for rows in (1576, 6288, 12608, 65536)}) == 4


def test_the_users_file_lies_on_top_of_what_ships_and_that_on_the_defaults(card, own, tmp_path):
    shipped = {"gpu": GPU, "tiles": [TILE, TILE | {"kernel": "dy_side"}], "forms": [FORM]}
    (tmp_path / "some-gpu-80gb.json").write_text(json.dumps(shipped))
    own({"gpu": GPU, "tiles": [TILE | {"rows": 128}], "forms": [FORM | {"below_rows": 8192, "torch_wins": False}]})
    assert tables.choose("branch", fake(1576, 768)) == Blocks(128, 64, 64, 4, 2)
    assert tables.choose("dy_side", fake(1576, 768)) == Blocks(32, 64, 64, 4, 2)
    assert tables.choose("shrink", fake(1576, 768)) == blocks.DEFAULTS["shrink", "few"]
    assert tables.choose("branch", fake(6288, 768)) == blocks.DEFAULTS["branch", "many"]
    assert tables.choose("branch", fake(1576, 768, torch.float32)) == blocks.DEFAULTS["branch", "fp32"]
    assert tables.choose_forms(fake(65536, 768), 3072) == Forms("tail", "branch", True)
    assert tables.choose_forms(fake(6288, 768), 3072) == Forms("tail", "branch", False)
    assert tables.choose_forms(fake(65536, 768, torch.float16), 3072) == Forms()
    assert mor_kernels.prefers_library(card, torch.bfloat16, 768, 3072, 65536)
    assert not mor_kernels.prefers_library(card, torch.bfloat16, 768, 3072, 6288)
    assert not mor_kernels.prefers_library(card, torch.bfloat16, 3072, 768, 65536)


def test_a_wide_rank_side_halves_the_tile_but_not_below_what_a_dot_takes(card, own):
    own({"gpu": GPU, "tiles": [TILE | {"inner": 16}]})
    assert tables.choose("branch", fake(1, 768), rank_columns=32) == Blocks(32, 16, 64, 4, 2)
    assert tables.choose("branch", fake(1, 768), rank_columns=64) == Blocks(32, 16, 32, 4, 2)


def test_asking_reads_a_file_once_and_nothing_from_the_card(card, own, monkeypatch):
    own({"gpu": GPU, "tiles": [TILE]})
    tables.table_of(card)

    def refuse(*args, **kwargs):
        raise AssertionError("the card was asked")

    monkeypatch.setattr(tables, "card", refuse)
    monkeypatch.setattr(Path, "read_text", refuse)
    for name in ("synchronize", "get_device_properties", "get_device_capability", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    x = fake(1576, 768)
    for kernel in blocks.KERNELS:
        tables.choose(kernel, x, 32)
    tables.choose_forms(x, 3072)
    mor_kernels.prefers_library(x.device, x.dtype, 768, 3072, 1576)


def test_the_forms_of_the_table_are_those_that_run(monkeypatch):
    """Each direction takes its own."""
    import mor_kernels.linear as linear

    taken = []
    for name in ("branch", "shrink", "matmul_tail"):
        original = getattr(linear, name)
        monkeypatch.setattr(linear, name, lambda *a, f=original, n=name, **k: (taken.append(n), f(*a, **k))[1])
    key = (torch.float32, 24, 40, 4096)
    arguments = [torch.randn(*s) for s in ((5, 24), (40, 24), (40,), (14, 24), (14, 40), (4, 24), (4,))]
    for forms, launched in (
        (Forms("tail", "branch"), ["shrink", "matmul_tail"]),
        (Forms("branch", "tail"), ["branch", "matmul_tail"]),
        (Forms("branch", "branch", torch_wins=True), ["branch"]),
    ):
        table = Table(blocks.default_tiles(None), {key: forms})
        monkeypatch.setattr(tables, "table_of", lambda device, table=table: table)
        x = arguments[0].clone().requires_grad_()
        y = mor_kernels.mor_linear(x, *arguments[1:], ranks=(2, 4, 8), scaling=(2.0, 2.0, 2.0), bypass=True)
        y.sum().backward()
        assert taken == launched
        taken.clear()


def test_preferring_the_library_is_a_constant_of_each_bucket_to_torch_compile(monkeypatch):
    table = Table({}, {(torch.float32, 8, 4, 8192): Forms(torch_wins=True)})
    monkeypatch.setattr(tables, "table_of", lambda device: table)
    graphs = []

    def remember(module, _):
        graphs.append(module)
        return module

    @torch.compile(fullgraph=True, dynamic=True, backend=remember)
    def function(x, weight):
        wins = mor_kernels.prefers_library(x.device, x.dtype, weight.shape[1], weight.shape[0], x.shape[0])
        return x.sum() + 1 if wins else x.sum() - 1

    weight = torch.nn.Parameter(torch.zeros(4, 8))
    for rows in (10, 5000, 10000, 50000):
        function(torch.zeros(rows, 8), weight)
    seen = len(graphs)
    for rows in (3, 4095, 4096, 8191, 8192, 32767, 32768, 70001):
        assert function(torch.zeros(rows, 8), weight) == (1 if 4096 <= rows < 8192 else -1)
    assert len(graphs) == seen


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"table\.json is no JSON: Expecting property name"),
        ([], "the whole file must be an object, got"),
        ({"gpu": "NVIDIA A100"}, "gpu must be 'Some GPU 80GB', the card at hand, got 'NVIDIA A100'"),
        ({"gpu": GPU, "dry_run": True}, "dry_run must be absent, since the interpreter's times mean nothing"),
        ({"gpu": GPU, "tile": []}, "tile must be absent, or one of"),
        ({"gpu": GPU, "tiles": {}}, "tiles must be a list, got"),
        ({"gpu": GPU, "tiles": [TILE, 3]}, r"tiles\[1\] must be an object, got 3"),
        ({"gpu": GPU, "tiles": [TILE | {"kernel": "brnach"}]}, r'tiles\[0\].kernel must be one of "shrink", "branch"'),
        ({"gpu": GPU, "tiles": [TILE | {"rows": 48}]}, r"tiles\[0\].rows must be one of 16, 32, .*, got 48"),
        ({"gpu": GPU, "tiles": [TILE | {"rows": 32.0}]}, r"tiles\[0\].rows must be one of .*, got 32.0"),
        ({"gpu": GPU, "tiles": [TILE | {"persistent": True}]}, r"tiles\[0\].persistent must be one of false, got True"),
        ({"gpu": GPU, "tiles": [TILE | {"below_rows": 5000}]}, "below_rows must be one of 4096, 8192, 32768, null"),
        ({"gpu": GPU, "tiles": [TILE | {"stagse": 2}]}, r"tiles\[0\].stagse must be absent, or one of"),
        ({"gpu": GPU, "tiles": [{k: v for k, v in TILE.items() if k != "rows"}]}, r"tiles\[0\].rows must .*, got None"),
        ({"gpu": GPU, "forms": [FORM | {"forward": "library"}]}, r'forms\[0\].forward must be one of "branch", "tail"'),
        ({"gpu": GPU, "forms": [FORM | {"K": "768"}]}, r"forms\[0\].K must be a positive integer, got '768'"),
        (
            {"gpu": GPU, "forms": [FORM | {"torch_wins": 1}]},
            r"forms\[0\].torch_wins must be one of false, true, got 1",
        ),
    ],
)
def test_a_wrong_file_is_named_with_its_field(card, own, content, message):
    path = own(content)
    with pytest.raises(ValueError, match=message) as raised:
        tables.choose("branch", fake(1, 768))
    assert str(path) in str(raised.value)


def test_a_missing_file_is_named(card, monkeypatch, tmp_path):
    monkeypatch.setenv(tables.VARIABLE, str(tmp_path / "nowhere.json"))
    with pytest.raises(ValueError, match=r"nowhere\.json cannot be read: No such file"):
        tables.table_of(card)


def shipped_files() -> list[Path]:
    return sorted((Path(tables.__file__).parent / "tables").glob("*.json"))


def test_what_ships_is_whole_measured_on_a_card_and_named_after_it():
    for path in shipped_files():
        content = json.loads(path.read_text())
        assert path.name == tables.file_name(content["gpu"])
        assert tables.read_table(path, content["gpu"]).tiles
        assert len(content["made"]["capability"]) == 2
        assert content["made"]["git"]["commit"] != "unknown" and not content["made"]["git"]["code_changed"]
