"""A model behind HTTP, with OpenAI's interface; the command is `sq-cpu serve`."""
