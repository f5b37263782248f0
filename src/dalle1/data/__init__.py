"""Captioned pictures, from tar shards to batches; nothing here knows a model.

Read in this order: `shards` (random access to tar members), `transforms` (bytes to pixels), `augmentation` (the
paper's random squares), `dataset` (samples and batches), `order` (which samples form batch number n), `loader`
(batches, resumable), `datamodule` (all of it for Lightning). `shard_writer` writes shards; `shapes` and
`shapes_shards` make the generated data set with it.
"""
