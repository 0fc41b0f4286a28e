"""Owns ``python main.py chat``: a conversation in a terminal, or the answer to what is piped in."""

from __future__ import annotations

import sys

from tiny_llm.chat.chat import Chat
from tiny_llm.chat.conversation import Conversation
from tiny_llm.commands.grouped import grouped
from tiny_llm.commands.loading import load
from tiny_llm.commands.talking import ANSWER, SystemOption, messages_of, print_stream, read_stdin
from tiny_llm.options import ENGINE, DebugOption, EngineOptions, command_app
from tiny_llm.sampling_params import SamplingParams

app = command_app()


@app.command()
@grouped("n", "logprobs", "prompt_logprobs")
def chat(
    system: SystemOption = None,
    params: SamplingParams = ANSWER,
    options: EngineOptions = ENGINE,
    debug: DebugOption = False,
) -> None:
    """Talk with a model ([b]the default command[/b]).

    In a terminal: a conversation; /help there lists its commands.

    With something piped in: the answer to it, and nothing else.
    """
    question = None if sys.stdin.isatty() else read_stdin()
    llm = load(options)
    if question is None:
        Chat(options.model, Conversation(llm, system), params).run()
    else:
        print_stream(llm.stream_chat(messages_of(system, question), params))
