"""The recipe of the emoji shards, on a font of a few coloured rectangles made here and lines as Unicode writes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import matplotlib
import pytest
from fontTools.feaLib.builder import addOpenTypeFeaturesFromString
from fontTools.fontBuilder import FontBuilder
from fontTools.ttLib import TTFont, newTable
from fontTools.ttLib.tables.BitmapGlyphMetrics import SmallGlyphMetrics
from fontTools.ttLib.tables.C_B_D_T_ import cbdt_bitmap_format_17
from fontTools.ttLib.tables.E_B_L_C_ import SbitLineMetrics, Strike, eblc_index_sub_table_1
from PIL import Image, ImageFont, features

from dalle1.data.shards import ShardIndex
from dalle1.data.transforms import decode_image

REPOSITORY = Path(__file__).parents[2]
needs_raqm = pytest.mark.skipif(not features.check("raqm"), reason="needs FriBiDi: apt install libfribidi0")

# In Unicode's order; the last two are no single pictures of the font below.
NAMES = """# group: Smileys & Emotion
1F600                      ; fully-qualified     # 😀 E1.0 grinning face
2764 FE0F                  ; fully-qualified     # ❤️ E0.6 red heart
2764                       ; unqualified         # ❤ E0.6 heart
1F9D1                      ; fully-qualified     # 🧑 E5.0 person
1F9D1 1F3FD                ; fully-qualified     # 🧑🏽 E5.0 person: medium skin tone
1F9D1 200D 2764 FE0F 200D 1F9D1 ; fully-qualified # 🧑 E13.1 couple with heart: person, person
1F3F4                      ; fully-qualified     # 🏴 E1.0 black flag
1F3F4 E0067 E0062 E0065 E006E E0067 E007F ; fully-qualified # 🏴 E5.0 flag: England
1F600 1F3FD                ; fully-qualified     # 😀 E99.0 grinning face: medium skin tone
1F970                      ; fully-qualified     # 🥰 E11.0 smiling face with hearts
"""
COLORS = {"smiley": "yellow", "heart": "red", "man": "blue", "tone": "brown", "flag": "black"}
COLORS |= {"couple": "purple", "toned": "green"}
CHARACTERS = {0x1F600: "smiley", 0x2764: "heart", 0x1F9D1: "man", 0x1F3FD: "tone", 0x1F3F4: "flag", 0x200D: "joiner"}
JOINED = "feature ccmp { sub man joiner heart joiner man by couple; sub man tone by toned; } ccmp;"


@pytest.fixture(scope="module")
def script(load_recipe: Callable[[str], ModuleType]) -> ModuleType:
    """The script as a module."""
    return load_recipe("make_emoji")


def _metrics() -> SbitLineMetrics:
    metrics = SbitLineMetrics()
    fields = "caretSlopeNumerator caretSlopeDenominator caretOffset minOriginSB minAdvanceSB maxBeforeBL minAfterBL"
    for field in (*fields.split(), "descender", "pad1", "pad2"):
        setattr(metrics, field, 0)
    metrics.ascender, metrics.widthMax = 8, 12
    return metrics


def _add_bitmaps(font: TTFont, encode: Callable[..., bytes]) -> None:
    """A PNG of 12 x 8 pixels in its colour for each glyph in COLORS, in the two tables that Noto Color Emoji has."""
    bitmaps = {}
    for name, color in COLORS.items():
        bitmaps[name] = bitmap = cbdt_bitmap_format_17(b"", font)
        bitmap.metrics, bitmap.imageData = SmallGlyphMetrics(), encode(Image.new("RGBA", (12, 8), color))
        vars(bitmap.metrics).update(height=8, width=12, BearingX=0, BearingY=8, Advance=12)
    font["CBDT"], font["CBLC"] = newTable("CBDT"), newTable("CBLC")
    font["CBDT"].version = font["CBLC"].version = 3.0
    font["CBDT"].strikeData = [bitmaps]
    places = eblc_index_sub_table_1(b"", font)
    ends = {"firstGlyphIndex": 1, "lastGlyphIndex": len(COLORS)}
    vars(places).update(names=list(COLORS), indexFormat=1, imageFormat=17, **ends)
    strike = Strike()
    strike.indexSubTables = [places]
    sizes = {"ppemX": 109, "ppemY": 109, "startGlyphIndex": 1, "endGlyphIndex": len(COLORS)}
    vars(strike.bitmapSizeTable).update(**sizes, colorRef=0, bitDepth=32, flags=1, hori=_metrics(), vert=_metrics())
    font["CBLC"].strikes = [strike]


@pytest.fixture
def source(tmp_path: Path, encode: Callable[..., bytes]) -> Path:
    """A directory with a font and the names."""
    builder = FontBuilder(109, isTTF=False)
    glyphs = [".notdef", *COLORS, "joiner"]
    builder.setupGlyphOrder(glyphs)
    builder.setupCharacterMap(CHARACTERS)
    builder.setupHorizontalMetrics({glyph: (0 if glyph == "joiner" else 12, 0) for glyph in glyphs})
    builder.setupHorizontalHeader(ascent=8, descent=0)
    builder.setupOS2()
    builder.setupPost()
    addOpenTypeFeaturesFromString(builder.font, JOINED)
    _add_bitmaps(builder.font, encode)
    builder.save(tmp_path / "tiny.ttf")
    (tmp_path / "emoji-test.txt").write_text(NAMES, encoding="utf-8")
    return tmp_path


def make(script: ModuleType, source: Path, *options: str, out: str = "out") -> None:
    paths = ["--font", str(source / "tiny.ttf"), "--names", str(source / "emoji-test.txt"), "--out", str(source / out)]
    script.main([*paths, "--image-size", "16", "--val-every", "3", *options])


def captions(*shards: Path) -> list[str]:
    index = ShardIndex([str(shard) for shard in shards])
    return [index[i].text() for i in range(len(index))]


@needs_raqm
def test_shards_hold_the_pictures_and_names_of_all_that_the_font_has(
    script: ModuleType, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(script, source)
    train, val = source / "out" / "train-00000.tar", source / "out" / "val-00000.tar"
    assert captions(train) == ["grinning face", "red heart", "couple with heart person person", "black flag"]
    assert captions(val) == ["person", "person medium skin tone"]  # the third emoji of six
    printed = capsys.readouterr().out
    assert "4 pictures for training and 2 for validation" in printed
    assert "3 emoji are left out, of which the font gives no single picture\n" in printed


@needs_raqm
def test_pictures_show_the_emoji_in_its_colours(script: ModuleType, source: Path) -> None:
    make(script, source)
    index = ShardIndex(str(source / "out" / "train-00000.tar"))
    purple = decode_image(index[2].image()).getpixel((8, 8))
    assert purple == pytest.approx((128, 0, 128), abs=3)
    metadata = index[2].metadata()
    assert metadata["codepoints"] == "1F9D1 200D 2764 FE0F 200D 1F9D1"
    assert (metadata["width"], metadata["height"]) == (16, 16)


def test_without_fribidi_no_sequence_is_drawn_and_one_line_says_so(
    script: ModuleType, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    basic = partial(ImageFont.truetype, layout_engine=ImageFont.Layout.BASIC)
    monkeypatch.setattr(script.ImageFont, "truetype", basic)
    make(script, source)
    train, val = source / "out" / "train-00000.tar", source / "out" / "val-00000.tar"
    assert captions(train, val) == ["grinning face", "red heart", "black flag", "person"]
    message = "5 emoji are left out, of which the font gives no single picture; skin tones, flags and families need"
    assert message in capsys.readouterr().out


def test_skin_tones_of_an_emoji_are_on_one_side_of_the_split(script: ModuleType) -> None:
    emoji = ["a", "b", "b\U0001f3fb", "b\U0001f3ff\u200db\U0001f3fb", "c", "b\u200db"]
    assert script.is_validation(emoji, 2) == [False, True, True, False, True, False]
    assert script.is_validation(emoji, 3) == [False, False, False, True, False, True]


def test_same_input_gives_the_same_bytes_and_keys_go_on_in_the_next_shard(script: ModuleType, source: Path) -> None:
    names = ["train-00000.tar", "train-00001.tar", "val-00000.tar"]
    for out in ("out", "again"):
        make(script, source, "--samples-per-shard", "2", out=out)
        assert {path.name for path in (source / out).iterdir()} >= set(names)
    first, again = ([(source / out / name).read_bytes() for name in names] for out in ("out", "again"))
    assert first == again
    assert b"000000002.jpg" in first[1]


def test_shards_that_are_there_are_not_touched(
    script: ModuleType, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(script, source)
    with pytest.raises(SystemExit):
        make(script, source, "--val-every", "2")
    assert "out must not exist yet or be an empty directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples-per-shard", "0"], "samples-per-shard must be >= 1, got 0"),
        (["--image-size", "-1"], "image-size must be >= 1, got -1"),
        (["--val-every", "1"], "val-every must be >= 2, got 1"),
        (["--val-every", "99"], "must name at least 99 emoji that the font has, got "),
        (["--names", str(REPOSITORY / "README.md")], "must be Unicode's emoji-test.txt, got a file without such lines"),
        (["--names", "nowhere"], "must be Unicode's emoji-test.txt, got no file 'nowhere'; apt install unicode-data"),
        (["--font", "nowhere"], "font must be a file, got no 'nowhere'; apt install fonts-noto-color-emoji"),
        (["--font", str(REPOSITORY / "README.md")], "must be Noto Color Emoji with bitmaps, but cannot be read"),
        (
            ["--font", f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"],
            "must be Noto Color Emoji with bitmaps, got a font without a coloured",
        ),
    ],
)
def test_bad_input_gets_one_sentence(
    script: ModuleType, source: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        make(script, source, *options)
    assert message in capsys.readouterr().err
    assert not (source / "out").exists()


@needs_raqm
def test_installed_font_draws_each_kind_of_emoji_as_one_picture(script: ModuleType) -> None:
    if not script.FONT.is_file():
        pytest.skip("needs a font: apt install fonts-noto-color-emoji")
    font = script.EmojiFont(script.FONT)
    farmer, black_cat, keycap = "\U0001f9d1\U0001f3ff\u200d\U0001f33e", "\U0001f408\u200d\u2b1b", "7\ufe0f\u20e3"
    for emoji in (farmer, black_cat, keycap):
        assert font.draw(emoji).size == (136, 128)
    france = font.draw("\U0001f1eb\U0001f1f7")
    (red, _, blue), (other_red, _, other_blue) = france.getpixel((30, 64)), france.getpixel((106, 64))
    assert red < blue
    assert other_red > other_blue
    for no_emoji in ("a", "\U0001f408\U0001f408", "\U0001f408\u200d\U0001f33e"):
        assert font.draw(no_emoji) is None
