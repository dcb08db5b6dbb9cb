"""A model on one worker: paged KV pool, prefix cache, one scheduler for chunks of prefill and decodes.

Does not know that disaggregation exists.
"""

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.core import Engine, Reservation
from engine.factory import create_engine
from engine.llm import LLM, Completion
from engine.sequence import EngineOutput, EngineRequest
from engine.weights import open_model
from splitserve.sampling import SamplingParams

__all__ = [
    "LLM",
    "AsyncEngine",
    "Completion",
    "Engine",
    "EngineConfig",
    "EngineOutput",
    "EngineRequest",
    "Reservation",
    "SamplingParams",
    "create_engine",
    "open_model",
]
