"""A server of files on this machine that can misbehave on request."""

import contextlib
import http.server
import re
import threading


class FileServer(http.server.ThreadingHTTPServer):
    """Serves `files` ({path: bytes}) and notes the requests: (method, path, Range).

    cut: {path: the bytes at which its next answers break off}. gate: while it is cleared, answers stop halfway.
    """

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests, self.cut = dict(files), [], {}
        self.gate, self.half_sent = threading.Event(), threading.Event()
        self.gate.set()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, path, begin = self.server, self.path.lstrip("/"), self.headers.get("Range")
        server.requests.append((self.command, path, begin))
        body = server.files[path]
        start = int(re.fullmatch(r"bytes=(\d+)-", begin)[1]) if begin else 0
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = server.cut[path].pop(0) if server.cut.get(path) else len(body)
        half = (start + stop) // 2
        self.wfile.write(body[start:half])
        self.wfile.flush()
        server.half_sent.set()
        server.gate.wait(60)
        self.wfile.write(body[half:stop])

    do_HEAD = do_GET


@contextlib.contextmanager
def serving(files):
    server = FileServer(files)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.gate.set()
        server.shutdown()
        thread.join()
        server.server_close()
