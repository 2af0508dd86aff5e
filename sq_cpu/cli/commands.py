"""The commands, in the order of the help."""

from sq_cpu.cli.autotune import autotune_command
from sq_cpu.cli.entry import Command, app
from sq_cpu.cli.generate import generate_command
from sq_cpu.cli.inspect import inspect_command
from sq_cpu.cli.module import SETTINGS, run_command
from sq_cpu.cli.quantize import quantize_command
from sq_cpu.cli.run import demo_command, eval_command, info_command
from sq_cpu.cli.serve import serve_command
from sq_cpu.cli.tune import tune_command

__all__ = ["app"]

app.command("quantize", cls=Command)(quantize_command)
app.command("tune", cls=Command)(tune_command)
app.command("autotune", cls=Command)(autotune_command)
app.command("eval", cls=Command)(eval_command)
app.command("generate", cls=Command)(generate_command)
app.command("serve", cls=Command)(serve_command)
app.command("run", cls=Command, context_settings=SETTINGS)(run_command)
app.command("info", cls=Command)(info_command)
app.command("inspect", cls=Command)(inspect_command)
app.command("demo", cls=Command)(demo_command)
