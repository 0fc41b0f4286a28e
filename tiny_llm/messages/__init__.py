"""Between messages and text: ``chat_prompt`` makes a model's prompt of them, ``message`` reads its answer."""
