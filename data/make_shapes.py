"""Make the shapes data set: `python data/make_shapes.py --out data/my-shapes` (see data/README.md)."""

from __future__ import annotations

import argparse

from dalle1.cli import errors_in_one_line
from dalle1.data.shapes import SceneMix
from dalle1.data.shapes_shards import ShapesRecipe


@errors_in_one_line()
def main(arguments: list[str] | None = None) -> None:
    """Make the shards that the command line asks for; do nothing if they are there already."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    mix = SceneMix()
    parser.add_argument("--out", required=True, help="directory for the shards")
    parser.add_argument("--train", type=int, default=20_000, help="training samples")
    parser.add_argument("--val", type=int, default=1_000, help="validation samples")
    parser.add_argument("--test", type=int, default=1_000, help="test samples, all with held-out pairs")
    parser.add_argument("--image-size", type=int, default=64, help="side of the pictures in pixels")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other scenes")
    parser.add_argument("--samples-per-shard", type=int, default=1_000)
    parser.add_argument("--single", type=float, default=mix.single, help="weight of scenes with one object")
    parser.add_argument("--pair", type=float, default=mix.pair, help="weight of scenes with two related objects")
    parser.add_argument("--count", type=float, default=mix.count, help="weight of scenes with equal objects")
    parser.add_argument("--jitter", type=float, default=mix.jitter, help="largest shift, as a share of the side")
    options = parser.parse_args(arguments)
    recipe = ShapesRecipe(
        directory=options.out,
        train_samples=options.train,
        val_samples=options.val,
        test_samples=options.test,
        image_size=options.image_size,
        seed=options.seed,
        mix=SceneMix(single=options.single, pair=options.pair, count=options.count, jitter=options.jitter),
        samples_per_shard=options.samples_per_shard,
    )
    recipe.ensure()


if __name__ == "__main__":
    main()
