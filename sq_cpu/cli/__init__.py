"""The command line `sq-cpu`: thin, it turns arguments into calls and results into text or JSON.

Exit codes: 0 done, 1 failed (one line on stderr), 2 wrong usage, 130 interrupted, 143 terminated.
What a command has to say goes to stdout, `--json` makes that one JSON object; progress goes to
stderr.
"""

from sq_cpu.cli.autotune import autotune_command
from sq_cpu.cli.entry import app, main
from sq_cpu.cli.inspect import inspect_command
from sq_cpu.cli.quantize import quantize_command
from sq_cpu.cli.run import demo_command, eval_command, generate_command, info_command
from sq_cpu.cli.tune import tune_command

__all__ = ["app", "main"]

# In the order of the help.
app.command("quantize")(quantize_command)
app.command("tune")(tune_command)
app.command("autotune")(autotune_command)
app.command("eval")(eval_command)
app.command("generate")(generate_command)
app.command("info")(info_command)
app.command("inspect")(inspect_command)
app.command("demo")(demo_command)
