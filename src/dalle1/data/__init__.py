"""Captioned pictures, from where they are to batches; nothing here knows a model.

    sources        what `data.train` may say: shards, folders, tables, addresses, with weights
    sample_index   samples under numbers: `shards` (tar members by their byte range), `folders`; `raw_sample` is one
    filters        which samples are left out, found out by `filter_scan` before training
    preparation    a raw sample to pixels (`transforms`, `augmentation`, `jpeg`) or image tokens, and its caption's
    dataset        samples by number, bad ones replaced; `findings` counts what was wrong
    order          which samples come when; `loader` makes resumable batches of them
    stream         the same from `remote` shards, which are read from beginning to end
    datamodule     all of it for Lightning, as `config` says

`token_shards` has image tokens instead of pictures; `inspect` shows what a data set is. `shard_writer` writes shards;
`shapes` and `shapes_shards` make the generated data set with it.
"""
