"""Language models that load upstream checkpoints by their own key names and generate exactly, in quasilinear
time."""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError(
        "futurefill_rs.models needs torch: install the extra with  pip install 'futurefill_rs[torch]'"
    ) from error

from futurefill_rs.models._base import LanguageModel
from futurefill_rs.models._io import KINDS, build, load
from futurefill_rs.models.flash_stu import FlashSTU
from futurefill_rs.models.hyenadna import HyenaDNA
from futurefill_rs.models.striped_hyena import StripedHyena
from futurefill_rs.models.striped_hyena_2 import StripedHyena2

__all__ = ["KINDS", "FlashSTU", "HyenaDNA", "LanguageModel", "StripedHyena", "StripedHyena2", "build", "load"]
