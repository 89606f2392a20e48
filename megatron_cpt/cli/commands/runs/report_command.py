"""Command `report`: one page about a run, made from its files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_cpt.errors import UserError

COMPARE_HELP = "Runs to compare it with."
OUTPUT_HELP = "The file to write [default: report.html in RUN_DIR]."
SERVE_HELP = "Show a live page of a running job on http://127.0.0.1 instead of writing a file; Ctrl-C ends it."
PORT_HELP = "Port of --serve; 0: any free one."
MARKDOWN_HELP = "Print summary and tables as Markdown, for a pull request; with --output, write them to the file."


def report(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run directory.")],
    compare: Annotated[list[Path] | None, typer.Option("--compare", metavar="RUN_DIR ...", help=COMPARE_HELP)] = None,
    output: Annotated[Path | None, typer.Option("--output", metavar="FILE", help=OUTPUT_HELP)] = None,
    serve: Annotated[bool, typer.Option("--serve", help=SERVE_HELP)] = False,
    port: Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help=PORT_HELP)] = 0,
    markdown: Annotated[bool, typer.Option("--markdown", help=MARKDOWN_HELP)] = False,
) -> None:
    """Write one HTML page about a run: what it learned and forgot, plan and reality, losses, speed, bad steps, digests.

    The page is made from the files of the run and needs no network. The run may still be training.
    """
    if serve and (output is not None or markdown):
        raise UserError("--serve shows a page and writes none; remove --output and --markdown")
    folders = [run_directory, *(compare or [])]
    if serve:
        _serve(folders, port)
    elif markdown:
        _print_markdown(folders, output)
    else:
        from megatron_cpt.report.write_report import write_report

        print(write_report(run_directory, compare=compare or (), output=output))


def _print_markdown(folders: list[Path], output: Path | None) -> None:
    from megatron_cpt.report.build_page import build_page
    from megatron_cpt.report.markdown_page import markdown_page
    from megatron_cpt.report.run_record import RunReader
    from megatron_cpt.report.write_report import check_output, write_report_file

    if output is not None:
        check_output(output)
    text = markdown_page(build_page([RunReader(folder).read() for folder in folders]))
    if output is None:
        print(text, end="")
    else:
        write_report_file(output, text)
        print(output)


def _serve(folders: list[Path], port: int) -> None:
    from megatron_cpt.report.live_server import HOST, open_server
    from megatron_cpt.report.run_record import RunReader

    readers = [RunReader(folder) for folder in folders]
    try:
        server = open_server(readers, port)
    except OSError as error:
        raise UserError(f"--port {port}: {error.strerror}; choose another one, or 0 for any free one") from error
    with server:
        print(f"http://{HOST}:{server.server_address[1]}/", flush=True)
        print("Ctrl-C ends it", file=sys.stderr)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
