"""Answers to the questions of MT-Bench and AlpacaEval: in process in batches, or over HTTP; resumable."""

from daekit.evaluation.answers.conversations import Answer, Conversation, HowToAnswer
from daekit.evaluation.answers.produce import answer_all, answer_by_client, endpoint_of, open_conversations, require_answerable
from daekit.evaluation.answers.questions import TEMPERATURES, alpaca_conversations, mt_bench_conversations
from daekit.evaluation.answers.store import AnswerStore

__all__ = [
    "TEMPERATURES",
    "Answer",
    "AnswerStore",
    "Conversation",
    "HowToAnswer",
    "alpaca_conversations",
    "answer_all",
    "answer_by_client",
    "endpoint_of",
    "mt_bench_conversations",
    "open_conversations",
    "require_answerable",
]
