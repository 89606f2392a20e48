"""The live page: new when the files of the run change, and for this machine only."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import orjson
import pytest

from megatron_cpt.cli import main
from megatron_cpt.report.live_server import open_server
from megatron_cpt.report.run_record import RunReader
from tests.helpers.report_runs import training_line, write_run

# A process of a background job, such as a test run under nohup, ignores SIGINT; this one takes it as from a terminal.
WITH_CTRL_C = """
import signal, sys
from megatron_cpt.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main())
"""


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run")


@pytest.fixture
def served(folder):
    server = open_server([RunReader(folder)], 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def get(url, **headers):
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
        return answer.read().decode()


def test_the_page_changes_with_the_metrics(served, folder):
    page, version = get(f"{served}/"), get(f"{served}/version")
    assert f'<body data-version="{version}">' in page
    assert "connect-src 'self'" in page
    assert "Finished: all 200 steps" in page.replace("<b>", "").replace("</b>", "")
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(orjson.dumps(training_line(210)) + b"\n")
    assert get(f"{served}/version") != version
    assert "210K tokens" in get(f"{served}/")


def test_other_paths_and_other_hosts_get_nothing(served):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(f"{served}/../../etc/passwd")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        get(f"{served}/", Host="evil.example:80")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        get(f"{served}/", Host="evil.example")
    assert get(f"{served}/", Host="127.0.0.1"), "as browsers ask on port 80"


@pytest.mark.parametrize(("path", "kind"), [("/", "text/html"), ("/version", "text/plain")])
def test_head_has_the_headers_of_get_and_no_content(served, path, kind):
    request = urllib.request.Request(f"{served}{path}", method="HEAD")
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert (answer.status, answer.headers.get_content_type(), answer.read()) == (200, kind, b"")
        assert int(answer.headers["Content-Length"]) == len(get(f"{served}{path}").encode())
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(urllib.request.Request(f"{served}/none", method="HEAD"), timeout=60)


def test_a_port_that_is_taken_is_the_users_mistake(served, folder, capsys):
    port = served.rpartition(":")[2]
    assert main(["report", str(folder), "--serve", "--port", port]) == 2
    assert f"--port {port}: Address already in use; choose another one" in capsys.readouterr().err


def test_ctrl_c_ends_the_command_with_status_0(folder):
    command = [sys.executable, "-c", WITH_CTRL_C, "report", str(folder), "--serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().strip()
        assert "Summary" in get(url)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "Ctrl-C ends it\n")
