"""Tokens written by models: in process (``local``), or by an OpenAI-compatible endpoint (``client``), one reply per question.

``ChatClient`` asks a model that is served, or one in a directory, keeps what arrives, and asks nothing twice; models under
evaluation and judges are asked through it. ``local.generate`` continues tokenised prompts with a model in memory.
"""

from daekit.generation.budget import Budget
from daekit.generation.calls import ChatReply, ChatRequest, Estimate
from daekit.generation.client import ChatClient
from daekit.generation.keys import Permissions

__all__ = ["Budget", "ChatClient", "ChatReply", "ChatRequest", "Estimate", "Permissions"]
