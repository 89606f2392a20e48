"""Optional behavior of the training loop, one hook per file."""

from __future__ import annotations

import importlib
import os
import sys

from megatron_cpt.config import RunConfig
from megatron_cpt.errors import CptError, UserError
from megatron_cpt.hooks.hook import Hook, HookList

__all__ = ["Hook", "HookList", "build_hooks"]


def build_hooks(config: RunConfig, *, console: bool = True) -> list[Hook]:
    """Build the hooks that a run.yaml asks for, in the order in which they are called.

    Args:
        config: the run.
        console: whether to print progress to stderr.

    Raises:
        UserError: a hook cannot be imported, or this machine lacks what it needs.
    """
    from megatron_cpt.hooks.event_log import EventsFile
    from megatron_cpt.hooks.jsonl_files import AnomaliesFile, MetricsFile
    from megatron_cpt.hooks.report_page import ReportPage

    hooks: list[Hook] = [MetricsFile(), AnomaliesFile(), EventsFile(), ReportPage()]
    if console:
        from megatron_cpt.hooks.console import ConsoleHook

        hooks.append(ConsoleHook())
    if config.resilience.straggler:
        from megatron_cpt.hooks.resiliency import StragglerHook

        hooks.append(StragglerHook())
    if config.profile is not None:
        from megatron_cpt.hooks.profiling import ProfileHook

        hooks.append(ProfileHook(config.profile))
    if config.log.tensorboard:
        from megatron_cpt.hooks.tensorboard import TensorBoardHook

        hooks.append(TensorBoardHook())
    if config.log.wandb is not None:
        from megatron_cpt.hooks.wandb import WandbHook

        hooks.append(WandbHook(config.log.wandb))
    return [*hooks, *(load_hook(entry) for entry in config.log.hooks)]


def load_hook(entry: str) -> Hook:
    """Import a `module:Class` entry of `log.hooks` and create the hook.

    The working directory is appended to `sys.path`: its modules can be imported but never replace installed ones.

    Raises:
        UserError: there is no such module or class, or the class is not a Hook.
    """
    module_name, _, class_name = entry.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"log.hooks: {entry}: module {module_name} cannot be imported ({type(error).__name__}: {error}); "
            "install it, or start the run in the folder that contains it"
        ) from error
    hook_class = getattr(module, class_name, None)
    if not (isinstance(hook_class, type) and issubclass(hook_class, Hook)):
        found = "has no class of that name" if hook_class is None else "has that name, but it is not a Hook"
        raise UserError(
            f"log.hooks: {entry}: module {module_name} {found}; name a class derived from megatron_cpt.Hook"
        )
    try:
        return hook_class()
    except CptError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"log.hooks: {entry}: {class_name}() failed ({type(error).__name__}: {error}); the class is created "
            "without arguments"
        ) from error
