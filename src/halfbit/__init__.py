"""halfbit: compress large language models until they fit the hardware people have, and run them compressed.

    import halfbit
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("folder-that-halfbit-compress-wrote")

Importing the package registers the quantizer "halfbit" with transformers.
"""

import halfbit.hf  # noqa: F401 (registration with transformers is what the import is for)
from halfbit.compress import compress
from halfbit.evaluate import evaluate, load
from halfbit.folder import inspect, verify
from halfbit.importers import import_checkpoint
from halfbit.manifest import unverified
from halfbit.recipe import Recipe

__all__ = ["Recipe", "compress", "evaluate", "import_checkpoint", "inspect", "load", "unverified", "verify"]
