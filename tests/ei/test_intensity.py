"""The setting for black and white: what it accepts."""

import pytest

from ei.config import DataConfig
from ei.intensity import Intensity


@pytest.mark.parametrize(
    ("text", "intensity"),
    [
        ("type", Intensity()),
        ("percentiles", Intensity("percentiles")),
        ("-160:240", Intensity("window", -160, 240)),
        ("0:4095", Intensity("window", 0, 4095)),
        ("-1e3:0.5", Intensity("window", -1000, 0.5)),
    ],
)
def test_what_is_understood(text: str, intensity: Intensity) -> None:
    assert Intensity.parse(text) == intensity


@pytest.mark.parametrize("text", ["", "auto", "240:-160", "1:1", "0", "0:", "0:nan", "-inf:0", "0:1:2", "0-1"])
def test_what_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="intensity must be type, percentiles, or LOW:HIGH"):
        Intensity.parse(text)
    with pytest.raises(ValueError, match="intensity must be"):
        DataConfig(intensity=(text,))


def test_one_for_all_modalities_or_one_for_each() -> None:
    modalities = ("cfp", "ct")
    for intensity, of_ct in ((("percentiles",), "percentiles"), (("type", "-160:240"), "-160:240")):
        config = DataConfig(modalities=modalities, intensity=intensity)
        assert config.intensity_of("ct") == Intensity.parse(of_ct)
        assert config.intensity_of("cfp") == Intensity.parse(intensity[0])
    with pytest.raises(ValueError, match="one for all modalities, or one for each"):
        DataConfig(modalities=modalities, intensity=("type",) * 3)
