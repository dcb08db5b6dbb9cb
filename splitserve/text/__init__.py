"""Text of a model: tokens to text and back, chat templates, stop strings. No torch, no transformers."""

from splitserve.text.detokenizer import IncrementalDetokenizer
from splitserve.text.stop import StopStrings
from splitserve.text.template import ChatTemplate
from splitserve.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "IncrementalDetokenizer", "StopStrings", "Tokenizer"]
