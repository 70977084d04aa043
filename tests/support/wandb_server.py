"""As much of a W&B server as wandb's own client needs: it keeps what runs and `wandb sync` send, on this machine."""

import gzip
import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Run:
    """What the server knows of a run."""

    def __init__(self, name):
        self.name = name
        self.config, self.group, self.tags = "{}", None, []
        self.lines = {}
        """File of the stream -> lines by number."""
        self.files = set()
        self.ended = None
        self.changed = 0
        """Points that came again with another content."""

    @property
    def history(self):
        """Rows in the order of the server's lines; a gap or a line sent again at another place would show."""
        lines = self.lines.get("wandb-history.jsonl", {})
        assert sorted(lines) == list(range(len(lines)))
        return [json.loads(lines[number]) for number in range(len(lines))]

    def bucket(self):
        """The run as GraphQL tells of it."""
        events = self.lines.get("wandb-events.jsonl", {})
        return {
            "id": self.name, "name": self.name, "displayName": self.name, "description": "", "config": self.config,
            "sweepName": None, "project": {"id": "p", "name": "sinkbed", "entity": {"id": "e", "name": "tester"}},
            "historyLineCount": len(self.history), "eventsLineCount": len(events), "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in self.history[-1:]]),
            "eventsTail": json.dumps([events[n] for n in sorted(events)[-1:]]), "summaryMetrics": "{}",
            "tags": self.tags, "notes": "", "wandbConfig": json.dumps({"t": 1}),
        }  # fmt: skip


class Server:
    """A server on 127.0.0.1; `delay` seconds before each answer."""

    def __init__(self):
        self.runs = {}
        self.views = []
        """Workspaces and reports as they were sent."""
        self.delay = 0.0
        self.silent = False
        """Takes connections and closes them without a word."""
        self.status = 200
        self.lock = threading.Lock()

        class Handler(_Handler):
            server_state = self

        self.http = _Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    @property
    def environment(self):
        """Variables that make wandb talk to it."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "5" * 40, "WANDB_MODE": "online"}

    def answer(self, query, variables):
        """Data of a GraphQL request."""
        name = (re.search(r"(?:query|mutation)\s+(\w+)", query) or [None, ""])[1]
        if name in ("Viewer", "GetDefaultEntity"):
            viewer = {"id": "u", "entity": "tester", "username": "tester", "email": "", "flags": "{}"}
            return {"viewer": viewer | {"teams": {"edges": []}}}
        if name == "ProjectInternalId":
            return {"project": {"id": "p", "internalId": "p"}}
        if name == "GetProjects":
            node = {"id": "p", "name": "sinkbed", "entityName": "tester", "isBenchmark": False, "user": None}
            edges = [{"node": node | {"createdAt": "2026-01-01T00:00:00"}, "cursor": ""}]
            return {"models": {"edges": edges, "pageInfo": {"endCursor": None, "hasNextPage": False}}}
        if "upsertView" in query:
            self.views.append(variables)
            return {
                "upsertView": {"view": {"id": f"view{len(self.views)}", "name": variables["name"]}, "inserted": True}
            }
        if name == "RunResumeStatus":
            run = self.runs.get(variables["name"])
            bucket = None if run is None else run.bucket()
            return {"model": {"id": "p", "name": "sinkbed", "entity": {"id": "e", "name": "tester"}, "bucket": bucket}}
        if name == "UpsertBucket":
            fresh = variables["name"] not in self.runs
            run = self.runs.setdefault(variables["name"], Run(variables["name"]))
            run.config = variables.get("config") or run.config
            run.group, run.tags = variables.get("groupName") or run.group, variables.get("tags") or run.tags
            return {"upsertBucket": {"bucket": run.bucket(), "inserted": fresh}}
        if name == "CreateRunFiles":
            self.runs[variables["run"]].files |= set(variables["files"])
            urls = [{"name": f, "uploadUrl": f"{self.url}/storage/{variables['run']}/{f}"} for f in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": urls}}
        return {}

    def stream(self, name, body):
        """Lines of a run's files."""
        run = self.runs[name]
        for file, part in (body.get("files") or {}).items():
            for number, line in enumerate(part["content"], part.get("offset") or 0):
                known = run.lines.setdefault(file, {})
                run.changed += file == "wandb-history.jsonl" and known.get(number, line) != line
                known[number] = line
        if body.get("complete"):
            run.ended = body.get("exitcode")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: Server

    def log_message(self, *args):
        pass

    def _body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

    def _handle(self):
        state, content = self.server_state, self._body()
        if state.silent:
            self.close_connection = True
            return
        time.sleep(state.delay)
        answer = {}
        with state.lock:
            if self.path == "/graphql":
                request = json.loads(content)
                answer = {"data": state.answer(request["query"], request.get("variables") or {})}
            elif self.path.endswith("/file_stream"):
                state.stream(self.path.split("/")[-2], json.loads(content))
        encoded = b"" if self.command == "HEAD" else json.dumps(answer).encode()
        self.send_response(state.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    do_GET = do_HEAD = do_PUT = do_POST = _handle


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass  # a client that was killed


@contextmanager
def serving():
    """A server that answers until the end of the block."""
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()
