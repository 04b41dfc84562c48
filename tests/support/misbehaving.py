# A function that floods its log, forks without an end, and does not care for SIGTERM.
import http.server
import os
import signal

signal.signal(signal.SIGTERM, signal.SIG_IGN)
LINE = "x" * 1000


def flood():
    for number in range(3000):
        print(number, LINE, flush=False)
    print("flooded", flush=True)
    return 3000


def fork():
    """How many processes it got; they stay."""
    for number in range(5000):
        try:
            pid = os.fork()
        except OSError:
            return number
        if pid == 0:
            while True:
                signal.pause()
    return 5000


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = str({"/flood": flood, "/fork": fork, "/": lambda: 0}[self.path]()).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)


http.server.HTTPServer(("0.0.0.0", int(os.environ["PORT"])), Handler).serve_forever()
