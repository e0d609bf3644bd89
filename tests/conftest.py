"""Settings of all tests."""

import os

from hypothesis import settings
from jaxtyping import install_import_hook

# Shapes and dtypes in annotations are checked on every call. Not in attention_mask: flex attention counts the
# arguments of its mask function, which a checked function hides.
install_import_hook(
    [
        "parallel.routing",
        "parallel.towers",
        "pretrain.models.cross_entropy",
        *(
            f"pretrain.models.{name}"
            for name in (
                "attention",
                "block",
                "decoder",
                "feed_forward",
                "inputs",
                "pretraining",
                "query_key",
            )
        ),
        "tools.bench.published_mot",
    ],
    "beartype.beartype",
)

# transformers, a reference for imported models, is given local folders only; nothing may be fetched
os.environ["HF_HUB_OFFLINE"] = "1"

# no deadline: cores are shared. Derandomized: the same examples in every run, so a red test stays red
settings.register_profile("motley", deadline=None, derandomize=True)
settings.load_profile("motley")
