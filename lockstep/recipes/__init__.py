"""Ready runs: the LightningModule, the data and the YAML that ``lockstep fit`` starts, and the demo."""

from lockstep.recipes.causal_lm import CausalLM
from lockstep.recipes.text import TextData

__all__ = ["CausalLM", "TextData"]
