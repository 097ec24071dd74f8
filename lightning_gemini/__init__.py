"""Train models larger than the GPU with the Lightning code you already have.

Importing this package registers the strategies ``gemini``, ``gemini_device`` and ``gemini_host``.
"""

from lightning_gemini.checkpoint.newest import newest_checkpoint
from lightning_gemini.pretrained import from_pretrained

try:
    from lightning_gemini.averaging import ShardedWeightAveraging
    from lightning_gemini.precision import GeminiPrecision
    from lightning_gemini.strategy import GeminiStrategy
except ModuleNotFoundError as error:
    # the engine in lightning_gemini.core works without Lightning
    if error.name is None or error.name.partition(".")[0] not in ("lightning", "lightning_utilities"):
        raise
    __all__ = ["from_pretrained", "newest_checkpoint"]
else:
    __all__ = ["GeminiPrecision", "GeminiStrategy", "ShardedWeightAveraging", "from_pretrained", "newest_checkpoint"]
