"""Files that come with the package."""

from pathlib import Path

BUILTIN = Path(__file__).parent / "builtin"
"""The built-in byte-level text model: `config.json`, `model.safetensors` and `MODEL_CARD.md`."""
