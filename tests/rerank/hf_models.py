"""Tiny random CLIP and SigLIP models in the format of transformers, with files such as released ones have."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from torch import Tensor

from dalle1.evaluation.pictures import to_pictures
from dalle1.rerank.hf_clip import HFCLIPReranker

SIDE, N_POSITIONS, N_SIGLIP_POSITIONS = 32, 40, 36
PROMPT = "a red circle, on a Blue square"
CAPTIONS = ["a red circle on a blue square", "two green triangles and a yellow star", "the small white box"] * 5
# As released: of CLIP (an old and a new form), SigLIP and SigLIP 2.
CLIP_PICTURES = {
    "crop_size": SIDE,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": SIDE,
}
SIGLIP_PICTURES = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "SiglipProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": SIDE, "width": SIDE},
}
KINDS = ("clip", "siglip", "siglip2")
SIZES = [(SIDE, SIDE), (64, 80), (20, 14), (100, 33), (31, 33), (150, 150)]


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def edit_json(path: Path, **changes: object) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def save_clip_tokenizer(directory: Path) -> int:
    """Bytes and a few merges. Returns the number of tokens; the last two are start and end."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    characters = sorted(ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>"), ("c", "i"), ("b", "l")]
    tokens = [*characters, *(c + "</w>" for c in characters), *("".join(merge) for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    CLIPTokenizer(vocab=vocab, merges=merges).save_pretrained(directory)
    return len(tokens)


def save_siglip_tokenizer(directory: Path) -> int:
    import sentencepiece
    from transformers import SiglipTokenizer

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_writer=model, vocab_size=60, hard_vocab_limit=False, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    path = directory / "spiece.model"
    path.write_bytes(model.getvalue())
    tokenizer = SiglipTokenizer(str(path), model_max_length=N_SIGLIP_POSITIONS)
    tokenizer.save_pretrained(directory)
    edit_json(directory / "tokenizer_config.json", model_input_names=["input_ids"])
    return len(tokenizer)


def save_siglip2_tokenizer(directory: Path) -> int:
    """Gemma's kind; padding and truncation are in its file, and it keeps capitals, as released."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(
        CAPTIONS, trainers.BpeTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer.enable_truncation(N_SIGLIP_POSITIONS)
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>", length=N_SIGLIP_POSITIONS)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "GemmaTokenizer", "padding_side": "right", "model_max_length": N_SIGLIP_POSITIONS}
    tokens = {"add_eos_token": True, "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    inputs = {"add_bos_token": False, "bos_token": "<bos>", "model_input_names": ["input_ids"]}
    write_json(directory / "tokenizer_config.json", config | tokens | inputs)
    return tokenizer.get_vocab_size()


def save_network(directory: Path, kind: str, n_tokens: int, **text_overrides: object) -> None:
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = shape | {"image_size": SIDE, "patch_size": 8}
    text = shape | {"vocab_size": n_tokens, "bos_token_id": n_tokens - 2, "eos_token_id": n_tokens - 1}
    text |= {"pad_token_id": 1, "max_position_embeddings": N_POSITIONS if kind == "clip" else N_SIGLIP_POSITIONS}
    text |= text_overrides
    torch.manual_seed(1)
    if kind == "clip":
        network = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    else:
        network = SiglipModel(SiglipConfig(text_config=text | {"projection_size": 32}, vision_config=vision))
    with torch.no_grad():
        for parameter in network.parameters():
            # Large enough that pictures differ in their scores.
            parameter += 0.15 * torch.randn(parameter.shape)
    network.save_pretrained(directory)


def save_model(directory: Path, kind: str, **text_overrides: object) -> None:
    """All files of a model, with the weights as safetensors."""
    directory.mkdir(parents=True)
    save = {"clip": save_clip_tokenizer, "siglip": save_siglip_tokenizer, "siglip2": save_siglip2_tokenizer}[kind]
    save_network(directory, kind, save(directory), **text_overrides)
    pictures = CLIP_PICTURES if kind == "clip" else SIGLIP_PICTURES | {"resample": 2 if kind == "siglip2" else 3}
    write_json(directory / "preprocessor_config.json", pictures)


def make_images(n: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Pictures of large and small shapes, with sharp edges that reach the limits of the range."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 3, 4, generator=generator)
    fine = torch.rand(n, 3, height, width, generator=generator)
    coarse = torch.nn.functional.interpolate(coarse, (height, width), mode="nearest")
    return (1.4 * (0.7 * coarse + 0.3 * fine) - 0.2).clamp(0, 1)


def tokens_of(images: Tensor) -> Tensor:
    return torch.zeros(len(images), 2, 2, dtype=torch.int64)


def score(reranker: HFCLIPReranker, images: Tensor, prompt: str = PROMPT) -> Tensor:
    return reranker.score(prompt, images, tokens_of(images))


def library_pixels(directory: Path, images: Tensor) -> Tensor:
    import transformers

    is_clip = json.loads((directory / "config.json").read_text())["model_type"] == "clip"
    processor = transformers.CLIPImageProcessorPil if is_clip else transformers.SiglipImageProcessorPil
    pixels: Tensor = processor.from_pretrained(directory)(to_pictures(images), return_tensors="pt")["pixel_values"]
    return pixels
