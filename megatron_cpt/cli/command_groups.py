"""Help that lists the commands by task.

typer can do this only in its rich mode, which takes brackets in a path for markup; plain text keeps them.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

GROUPS = PLAN, DATA, TRAIN, CHECKPOINTS, EVALUATE, OPERATIONS = (
    "Plan",
    "Data",
    "Train",
    "Checkpoints",
    "Evaluate",
    "Operations",
)


class GroupedCommands(TyperGroup):
    """A typer group whose help has one section per `rich_help_panel`, in the order of `GROUPS`."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the name and the first sentence of each command."""
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in GROUPS}
        width = max(map(len, self.commands))
        for name, command in self.commands.items():
            assert isinstance(command, TyperCommand | TyperGroup)
            row = (name.ljust(width), command.get_short_help_str(limit=1000))
            sections.setdefault(command.rich_help_panel or "Other", []).append(row)
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
