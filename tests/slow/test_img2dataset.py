"""From a list of addresses to training, with img2dataset itself and a server on this machine: `make test-slow`.

img2dataset runs in a virtual environment of its own, `.venv-img2dataset` or what DALLE1_IMG2DATASET_VENV names, because
it needs an older webdataset than ours.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from served_pictures import (
    REPOSITORY,
    PictureServer,
    bad_pictures,
    emoji_or_shapes,
    encode,
    photo,
    serve_pictures,
    unusual_pictures,
)

from dalle1.data.raw_sample import RawSample
from dalle1.data.shards import ShardIndex
from dalle1.data.transforms import decode_image

VENV = Path(os.environ.get("DALLE1_IMG2DATASET_VENV", REPOSITORY / ".venv-img2dataset"))
IMG2DATASET = VENV / "bin" / "img2dataset"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not IMG2DATASET.is_file(), reason=f"needs {IMG2DATASET}: make test-slow"),
]

# The settings that data/ recommends.
OPTIONS = (
    *("--input_format", "jsonl", "--url_col", "url", "--caption_col", "caption", "--output_format", "webdataset"),
    *("--image_size", "384", "--resize_mode", "keep_ratio", "--resize_only_if_bigger", "True"),
    *("--min_image_size", "256", "--max_aspect_ratio", "2"),
)
# How data/ says that a list of tab-separated values becomes one in which a quotation mark is a letter like any other.
FROM_TSV = r"""import json, sys
for line in sys.stdin.buffer:
    print(json.dumps(dict(zip(sys.argv[1:], line.decode().rstrip("\r\n").split("\t")))))"""
STRANGE_CAPTIONS = {
    "none.jpg": None,
    "blank.jpg": "",
    "lines.jpg": "first line\nsecond line\r\nthird line",
    "spaces.jpg": "  a tab\there and spaces  ",
    "joined.jpg": "\U0001f9d1\u200d\U0001f33e \u0645\u0631\u062d\u0628\u0627 na\u00efve \u4f60\u597d \u202e!",
    "quotes.jpg": '"quoted" and it\'s {"json": [1]} \\n',
    "digits.jpg": "2024",
}
QUOTED = ['"a caption that opens a quotation', 'a "quoted" word', '"closed"', "2020-01-01", "NA"]


def start(url_list: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start img2dataset in a group of processes of its own."""
    command = [IMG2DATASET, "--url_list", url_list, "--output_folder", out, *OPTIONS, *options]
    environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    with open(out.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def download(url_list: Path, out: Path, *options: str) -> ShardIndex:
    """Run img2dataset to its end and read what it wrote."""
    assert start(url_list, out, *options).wait() == 0, out.with_suffix(".log").read_text(errors="replace")
    return ShardIndex(str(out / "*.tar"))


def write_list(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def samples(index: ShardIndex) -> dict[str, RawSample]:
    """Samples by the last part of their address."""
    found = {index[i].metadata()["url"].rpartition("/")[2]: index[i] for i in range(len(index))}
    assert len(found) == len(index)
    return found


@dataclass(frozen=True, kw_only=True)
class Web:
    """Pictures of the web as img2dataset downloaded them: hundreds of good ones, some bad, one shard of bad ones."""

    out: Path
    index: ShardIndex
    captions: dict[str, str | None]  # of the good ones, by the last part of their address
    n_bad: int


@pytest.fixture(scope="module")
def server() -> Iterator[PictureServer]:
    with serve_pictures() as server:
        yield server


@pytest.fixture(scope="module")
def web(server: PictureServer, tmp_path_factory: pytest.TempPathFactory) -> Web:
    directory = tmp_path_factory.mktemp("web")
    lists, captions = directory / "lists", dict[str, str | None]()
    lists.mkdir()
    for number, (data, caption) in enumerate(emoji_or_shapes(directory, 150)):
        server.files[f"drawn-{number}"], captions[f"drawn-{number}"] = data, caption
    for number in range(100):
        size = [(640, 480), (480, 640), (500, 375), (320, 260)][number % 4]
        server.files[f"photo-{number}.jpg"] = encode(photo(number, *size), quality=90)
        captions[f"photo-{number}.jpg"] = f"photograph number {number}"
    server.files |= {name: encode(photo(9, 400, 400)) for name in STRANGE_CAPTIONS}
    captions |= STRANGE_CAPTIONS
    for name, data in unusual_pictures().items():
        server.files[quote(name)], captions[quote(name)] = data, name
    server.files["moved.jpg"], captions["moved.jpg"] = b"", "moved"
    server.headers["moved.jpg"] = {"Location": "/photo-1.jpg"}
    bad = bad_pictures() | {"unwanted.jpg": encode(photo(9, 400, 400)), "shorter.jpg": encode(photo(9, 400, 400))}
    server.files |= bad
    server.headers["unwanted.jpg"] = {"X-Robots-Tag": "noai"}
    server.headers["shorter.jpg"] = {"Content-Length": "1000000"}
    server.waits.add("slow.jpg")
    failing = [*bad, "slow.jpg", "gone.jpg"]
    rows = [{"url": server.address + name, "caption": caption} for name, caption in captions.items()]
    # Spread over the list, as in life.
    for place, name in enumerate(failing):
        rows.insert(place * 20, {"url": server.address + name, "caption": "never seen"})
    write_list(lists / "1.jsonl", rows)
    write_list(lists / "2.jsonl", [{"url": f"{server.address}gone-{i}.jpg", "caption": "gone"} for i in range(20)])
    for number, caption in enumerate(QUOTED):
        server.files[f"quoted-{number}.jpg"], captions[f"quoted-{number}.jpg"] = encode(photo(9, 400, 300)), caption
    tsv = "".join(f"{caption}\t{server.address}quoted-{number}.jpg\n" for number, caption in enumerate(QUOTED))
    command = [sys.executable, "-c", FROM_TSV, "caption", "url"]
    (lists / "3.jsonl").write_bytes(subprocess.run(command, input=tsv.encode(), capture_output=True, check=True).stdout)
    index = download(
        lists, directory / "out", "--number_sample_per_shard", "60", "--thread_count", "16", "--timeout", "5"
    )
    return Web(out=directory / "out", index=index, captions=captions, n_bad=len(failing) + 20)


def test_lists_are_converted_as_the_documentation_says() -> None:
    assert any(FROM_TSV in page.read_text(encoding="utf-8") for page in (REPOSITORY / "data").glob("*.md"))


def test_samples_are_the_pictures_that_could_be_had(web: Web) -> None:
    assert samples(web.index).keys() == web.captions.keys()
    assert len(web.index) > 250


def test_captions_are_those_of_the_list(web: Web) -> None:
    for name, sample in samples(web.index).items():
        caption = web.captions[name]
        assert sample.text() == (caption or "").strip()
        assert sample.metadata()["caption"] == caption


def test_pictures_are_reduced_to_384_pixels_on_their_short_side_and_never_enlarged(web: Web) -> None:
    for sample in samples(web.index).values():
        metadata = sample.metadata()
        assert metadata["status"] == "success"
        assert metadata["key"] == sample.key
        picture = decode_image(sample.image())
        assert picture.size == (metadata["width"], metadata["height"])
        original = min(metadata["original_width"], metadata["original_height"])
        assert min(picture.size) == min(original, 384)


def test_orientation_is_lost_but_for_a_note_in_the_metadata(web: Web) -> None:
    turned = samples(web.index)["turned.jpg"]
    assert decode_image(turned.image()).size == (384, 512)  # upright it would be 512 x 384
    assert json.loads(turned.metadata()["exif"]) == {"Image Orientation": "Rotated 90 CW"}


def test_failed_downloads_are_counted_and_leave_no_sample(web: Web) -> None:
    statistics = [json.loads(path.read_text()) for path in web.out.glob("*_stats.json")]
    assert sum(shard["successes"] for shard in statistics) == len(web.index)
    assert sum(shard["failed_to_download"] + shard["failed_to_resize"] for shard in statistics) == web.n_bad
    assert 0 in [shard["successes"] for shard in statistics]
    for suffix in (".parquet", ".tar", "_stats.json"):
        assert len(list(web.out.glob(f"*{suffix}"))) == len(statistics)


def test_all_captions_of_a_coco_picture_are_in_its_metadata(server: PictureServer, tmp_path: Path) -> None:
    names = [f"{number:012d}.jpg" for number in range(10)]
    server.files |= {name: encode(photo(5, 640, 427)) for name in names}
    images = [{"id": i, "license": 1, "coco_url": server.address + name} for i, name in enumerate(names)]
    annotations = [{"image_id": i, "caption": f"Caption {n}, a café\n"} for n in range(5) for i in range(10)]
    content = {"images": images, "annotations": annotations, "licenses": [{"id": 1, "url": "http://terms/"}]}
    (tmp_path / "captions.json").write_text(json.dumps(content))
    recipe = [sys.executable, REPOSITORY / "data" / "make_coco_list.py", "--captions", tmp_path / "captions.json"]
    subprocess.run([*recipe, "--out", tmp_path / "coco.jsonl"], check=True, capture_output=True)
    columns = '["captions","image_id","license"]'
    index = download(tmp_path / "coco.jsonl", tmp_path / "out", "--save_additional_columns", columns)
    found = samples(index)
    assert found.keys() == set(names)
    for number, name in enumerate(names):
        assert found[name].text() == "Caption 0, a café"
        metadata = found[name].metadata()
        assert metadata["captions"] == [f"Caption {n}, a café" for n in range(5)]
        assert (metadata["image_id"], metadata["license"]) == (number, "http://terms/")


def test_interrupted_download_is_named_and_goes_on_when_it_is_started_again(
    server: PictureServer, tmp_path: Path
) -> None:
    names = [f"long-{number}.jpg" for number in range(30)]
    server.files |= {name: encode(photo(5, 400, 400)) for name in names}
    server.waits.add(names[15])
    server.asked.clear()
    write_list(tmp_path / "list.jsonl", [{"url": server.address + name, "caption": name} for name in names])
    options = ("--number_sample_per_shard", "10", "--thread_count", "1", "--timeout", "60")
    process = start(tmp_path / "list.jsonl", tmp_path / "out", *options)
    assert server.asked.wait(60)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(ValueError, match=r"00001.tar' is truncated"):
        ShardIndex(str(tmp_path / "out" / "*.tar"))
    server.waits.discard(names[15])
    assert samples(download(tmp_path / "list.jsonl", tmp_path / "out", *options)).keys() == set(names)


def command(folder: Path, *arguments: str | Path) -> str:
    """What a command of ours prints, started in `folder`; it must end well."""
    environment = os.environ | {"DALLE1_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def summary(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads((folder / "runs" / "web" / stage / "summary.json").read_text())


def test_inspect_reports_what_img2dataset_wrote(web: Web, tmp_path: Path) -> None:
    (tmp_path / "conf").symlink_to(REPOSITORY / "conf")
    text = command(tmp_path, "-m", "dalle1.data.inspect", str(web.out / "*.tar"), "filters=paper", "out=inspected")
    report = json.loads((tmp_path / "inspected" / "report.json").read_text())
    assert text.startswith(f"{len(web.index):,} samples in 6 shards")
    assert report["samples"] == len(web.index)
    n_dropped = sum(reason["samples"] for reason in report["dropped_by_filters"].values())
    assert 0 < n_dropped == len(web.index) - report["kept_by_filters"]
    for name in ("samples.png", "histograms.png", "dropped.png"):
        assert (tmp_path / "inspected" / name).is_file()


def test_tokens_are_made_and_a_transformer_is_trained_from_what_img2dataset_wrote(web: Web, tmp_path: Path) -> None:
    train = f"data.train={web.out}/0000[0-3].tar"
    val = f"data.val={web.out}/00004.tar"
    common = [
        *("experiment=emoji", "name=web", train, val, "data.on_bad_sample=skip", "data.max_bad_fraction=0.2"),
        *("image_size=32", "grid_size=8", "image_vocab_size=64", "trainer.enable_progress_bar=false"),
        *("trainer.accelerator=cpu", "trainer.log_every_n_steps=10", "callbacks.checkpoint.every_n_steps=100"),
    ]
    sizes = {
        "tokenizer": [],
        "dvae": [
            *("model.n_hid=16", "model.n_init=16", "model.n_groups=1", "model.patch_size=4"),
            *("optim.max_steps=60", "optim.warmup_steps=5", "optim.codebook_start_step=30", "optim.batch_size=8"),
        ],
        "tokens": ["data.augmentation=transformer", "data.cache_images=false", "stage.crops=2"],
        "transformer": [
            *("model.d_model=32", "model.n_layers=2", "model.n_heads=2", "optim.batch_size=8"),
            *("optim.max_steps=60", "optim.warmup_steps=5", "data.tokens=runs/web/tokens"),
        ],
    }
    for stage, options in sizes.items():
        command(tmp_path, REPOSITORY / "train.py", f"stage={stage}", *common, *options)
    n_good = sum(len(ShardIndex(str(web.out / f"0000{number}.tar"))) for number in range(5))
    assert sum(summary(tmp_path, "tokens")["pictures"].values()) == n_good
    # The two captions that are empty.
    assert 0 <= summary(tmp_path, "tokenizer")["bad_samples"] <= 2
    losses = (tmp_path / "runs" / "web" / "transformer" / "logs" / "version_0" / "metrics.csv").read_text()
    assert summary(tmp_path, "transformer")["image_nats_per_token"] < 4.1, losses  # ln 64 = 4.16
