"""Packaging of composer-gpt2. Everything that is not packaging is configured in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent

# What mosaicml 0.32.1 allows, and nothing newer; streaming's minor version because
# composer_gpt2/data/streaming.py mends its internals.
INSTALL_REQUIRES = [
    "mosaicml[nlp,streaming]==0.32.1",
    "mosaicml-streaming>=0.13.0,<0.14",
    "torch>=2.6.0,<2.7.1",
    "transformers>=4.53,<4.54",
    "tiktoken>=0.9",
    "omegaconf>=2.3,<3",
    "packaging>=22",
    "psutil>=5",
    "pydantic>=2.7,<3",
    "pyyaml>=6,<7",
    "numpy>=1.26,<2.2",
    "pyarrow>=15",
    "boto3>=1.21.45,<2",
    "datasets>=2.14,<5",
    "botocore>=1.24",
    "filelock>=3",
    "huggingface-hub>=0.21,<0.34",
    "safetensors>=0.4.3",
    "xxhash>=3,<4",
    "tqdm>=4.64",
    "tokenizers>=0.21,<0.22",
    "torchmetrics>=1.0,<1.7.5",
    "matplotlib>=3.7",
    "typer>=0.12",
    "typing-extensions>=4",
]

EVAL = ["lm-eval[hf]>=0.4.9,<0.5"]
ONNX = ["onnx>=1.17", "onnxruntime>=1.19", "onnxscript>=0.2"]  # `export --onnx`
LOCAL_S3 = ["moto[server,s3]>=5"]  # the S3 server of `make train` and of the tests

EXTRAS_REQUIRE = {
    "s3-server": LOCAL_S3,
    "onnx": ONNX,
    "gpu": ["liger-kernel>=0.8,<0.9"],  # kernels of fused_layernorm and fused_cross_entropy
    "test": [
        *EVAL,  # 250 MB, ten seconds with uv
        *LOCAL_S3,
        *ONNX,
        "codespell>=2.3",
        "hypothesis>=6.100",
        "pyright>=1.1.380",
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.8",
        "setuptools>=77",  # builds the wheel in tests/test_packaging.py, without network
        "tensorboard>=2.9.1,<3",
        "yamllint>=1.35",
    ],
    "docs": ["furo>=2024.8", "myst-parser>=4", "sphinx>=8"],
    "bench": ["accelerate>=1"],  # for Hugging Face's Trainer, which `composer-gpt2 bench` times
    "eval": EVAL,
    "demo": ["gradio>=6.17,<6.18"],
    "browser": ["playwright>=1.40,<2"],  # drives the Chromium of the system in tests/test_demo.py
}


class BuildWithRecipes(build_py):
    """Installs ``yamls/`` as ``composer_gpt2/yamls``; in a checkout it stays on top."""

    def run(self):
        """Builds the packages, then adds the recipes."""
        super().run()
        if not self.editable_mode:
            for target, source in self._recipes().items():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target)

    def get_outputs(self, include_bytecode=True):
        """What is installed."""
        return [*super().get_outputs(include_bytecode), *self._recipes()]

    def get_output_mapping(self):
        """Where it comes from: what a strict editable install links."""
        return {**super().get_output_mapping(), **self._recipes()}

    def _recipes(self):
        folder = Path(self.build_lib) / "composer_gpt2" / "yamls"
        recipes = sorted((ROOT / "yamls").glob("*.yaml"))
        return {str(folder / path.name): str(path.relative_to(ROOT)) for path in recipes}


setup(
    name="composer-gpt2",
    version=runpy.run_path(str(ROOT / "composer_gpt2" / "_version.py"))["__version__"],
    description="GPT-2-class pretraining as a plugin for MosaicML Composer",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    package_dir={"": "."},
    packages=find_packages(
        include=["composer_gpt2", "composer_gpt2.*", "algorithms", "algorithms.*"]
    ),
    package_data={
        "composer_gpt2": [
            "assets/*",
            "configs/*.yaml",
            "cpu_kernels/*.cpp",
            "cpu_kernels/*.h",
            "py.typed",
        ],
        "algorithms": ["*/README.md", "*/recipe.yaml"],
    },
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={
        "console_scripts": ["composer-gpt2 = composer_gpt2.cli:main"],
        # Under names of their own: llm-foundry has an `alibi` too, Composer's.
        "llmfoundry_algorithms": [
            "composer_gpt2_activation_checkpointing"
            " = algorithms.activation_checkpointing:ActivationCheckpointing",
            "composer_gpt2_alibi = algorithms.alibi:ALiBi",
            "composer_gpt2_fused_block = algorithms.fused_block:FusedBlock",
            "composer_gpt2_fused_cross_entropy = algorithms.fused_cross_entropy:FusedCrossEntropy",
            "composer_gpt2_fused_gelu = algorithms.fused_gelu:FusedGELU",
            "composer_gpt2_fused_layernorm = algorithms.fused_layernorm:FusedLayerNorm",
            "composer_gpt2_pad_vocabulary = algorithms.pad_vocabulary:PadVocabulary",
            "composer_gpt2_parallel_residual = algorithms.parallel_residual:ParallelResidual",
            "composer_gpt2_seq_length_warmup = algorithms.seq_length_warmup:SequenceLengthWarmup",
            "composer_gpt2_skip_loss_spikes = algorithms.skip_loss_spikes:SkipLossSpikes",
            "composer_gpt2_skip_nonfinite = algorithms.skip_nonfinite:SkipNonfinite",
        ],
    },
    cmdclass={"build_py": BuildWithRecipes},
)
