"""Imports point one way, and only where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "dalle1"

# From the top to the bottom: a module may import from lines below its own, and from its own line.
LAYERS = [
    [
        "app",
        "training",
        "evaluation.report",
        "evaluation.sampling_curves",
        "evaluate",
        "evaluation.tokenizer_command",
        "evaluation.system_command",
        "evaluation.transformer_command",
        "evaluation.overlap_command",
        "evaluation.overlap_page",
        "evaluation.captioned_tokens",
        "evaluation.transformer_likelihood",
        "evaluation.position_figures",
        "compare",
        "evaluation.command",
        "evaluation.sampled_sets",
        "evaluation.reconstructions",
        "evaluation.feature_sets",
        "evaluation.chunks",
        "evaluation.extractors",
        "evaluation.picture_sets",
        "evaluation.ranks",
        "evaluation.readable_pictures",
        "convert",
        "export",
        "reconstruct",
        "sample",
        "score",
        "plan",
        "status",
        "data.inspect",
        "data.survey_pictures",
        "data.survey_report",
        "data.survey_text",
    ],
    ["web"],
    ["results"],
    ["comparison_page", "gallery", "picture_grid", "preview", "run_origin"],
    ["html_page"],
    ["run_records"],
    ["pipeline"],
    ["decode_and_rank"],
    ["rerank"],
    ["cli"],
    ["sampling"],
    ["checkpoint"],
    ["released"],
    ["tokenizers"],
    ["evaluation"],
    ["losses"],
    ["models"],
    ["data"],
    ["run_models", "run_status", "sharded_files"],
    ["atomic_files"],
]
# Where each framework may appear; everything else is plain PyTorch.
ALLOWED = {
    "pytorch_lightning": ("training", "data.datamodule"),
    "hydra": ("cli", "data.inspect", "training.run", "training.trainer", "training.launch", "training.sweep_job"),
    "omegaconf": (
        "app",
        "cli",
        "data.inspect",
        "sample",
        "training.run",
        "training.trainer",
        "training.launch",
        "training.sweep_job",
        "training.ranks",
        "plan",
    ),
    "fastapi": ("web.server",),
    "starlette": ("web.guard", "web.server"),
    "uvicorn": ("app",),
    "wandb": ("training.logging",),
    "webdataset": ("data",),
    "transformers": ("rerank.hf_clip", "rerank.hf_files"),
    "huggingface_hub": ("rerank.hf_files", "evaluation.extractors"),
}

MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}


def _imports(path: Path) -> list[str]:
    """Absolute names of all modules that a file imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names.append(node.module or "")
    return names


def _layer(module: str) -> int:
    matches = [
        (len(prefix), number)
        for number, layer in enumerate(LAYERS)
        for prefix in layer
        if module == prefix or module.startswith(prefix + ".")
    ]
    assert matches, f"{module} is in no layer: add it to LAYERS and to docs/architecture.md"
    return max(matches)[1]


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__"])
def test_imports_point_down(module: str) -> None:
    own = [name.removeprefix("dalle1.") for name in _imports(MODULES[module]) if name.startswith("dalle1.")]
    wrong = [name for name in own if _layer(name) < _layer(module)]
    assert not wrong, f"{module} imports from above itself: {wrong}"


@pytest.mark.parametrize("framework", ALLOWED)
def test_framework_is_imported_only_where_it_belongs(framework: str) -> None:
    users = [name for name, path in MODULES.items() if any(i.split(".")[0] == framework for i in _imports(path))]
    assert users, f"nobody imports {framework}"
    wrong = [user for user in users if not user.startswith(ALLOWED[framework])]
    assert not wrong


def test_models_import_without_any_framework() -> None:
    code = (
        "import sys, dalle1.models.dvae, dalle1.models.transformer, dalle1.models.clip, dalle1.losses;"
        "print(sorted({'pytorch_lightning', 'hydra', 'omegaconf', 'wandb'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_transformers_is_imported_only_with_a_model_of_it() -> None:
    code = (
        "import sys, dalle1.rerank.hf_clip;"
        "print(sorted({'transformers', 'huggingface_hub', 'pytorch_lightning'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_function_is_short_and_every_file_is_one_concern() -> None:
    for path in MODULES.values():
        text = path.read_text()
        assert text.count("\n") <= 450, f"{path.name} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= 80, f"{path.name}: {node.name} has {length} lines"
