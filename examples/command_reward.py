#!/usr/bin/env python3
"""A reward for rldiff in Python: put your own function in place of `brightness`.

    reward = { name = "command", command = ["python3", "examples/command_reward.py"], timeout_seconds = 60.0,
               start_timeout_seconds = 600.0, restarts = 3 }

rldiff starts one of these per rank. Or one for all ranks, started by you, on a socket (HOST:PORT or unix:PATH) or by HTTP
(http://HOST:PORT/):

    python3 examples/command_reward.py 127.0.0.1:7070
    reward = { name = "server", address = "127.0.0.1:7070", timeout_seconds = 60.0, start_timeout_seconds = 600.0,
               restarts = 3 }

The protocol is described in src/rewards/protocol.rs.
"""
import http.server
import json
import math
import os
import socketserver
import sys
import threading


def brightness(pictures, prompts, ids):
    """One number per picture; None or NaN where there is none. pictures[i] is (rgb, height, width) with the RGB bytes
    row by row, prompts[i] is {"text": …, "objects": […]}, ids[i] names the sample."""
    return [sum(rgb) / (255 * len(rgb)) for rgb, _height, _width in pictures]


def converse(reward, requests, answers):
    """Answers the batches on the stream `requests` with what `reward` says, until it ends."""

    def answer(value):
        answers.write((json.dumps(value, allow_nan=False) + "\n").encode())
        answers.flush()

    answer({"rldiff_reward": 1})
    for line in requests:
        answer(judge(reward, line, requests))


def judge(reward, line, requests):
    """The answer to the batch whose first line is `line` and whose pictures follow on `requests`."""
    header = json.loads(line)
    height, width = header["height"], header["width"]
    pictures = [(read(requests, height * width * 3), height, width) for _ in range(header["count"])]
    scores = [None if s is None else float(s) for s in reward(pictures, header["prompts"], header["ids"])]
    scores = [None if s is None or not math.isfinite(s) else s for s in scores]
    return {"batch": header["batch"], "scores": scores}


def read(stream, size):
    data = stream.read(size)
    if len(data) != size:
        raise EOFError("rldiff ended within a batch")
    return data


def take_output():
    """Standard output for the protocol alone: what anything prints from now on goes to standard error. To be called before
    models are loaded, where that prints."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers


def serve(reward, answers=None):
    """A process of one rank: its input and output (or what `take_output` gave)."""
    answers = answers or take_output()
    converse(reward, os.fdopen(os.dup(0), "rb"), answers)


def listen(reward, address):
    """A server for several ranks; batches are judged one at a time."""
    turn = threading.Lock()

    def in_turn(*batch):
        with turn:
            return reward(*batch)

    class Connection(socketserver.StreamRequestHandler):
        def handle(self):
            converse(in_turn, self.rfile, self.wfile)

    class Requests(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.answer({"rldiff_reward": 1})

        def do_POST(self):
            self.answer(judge(in_turn, self.rfile.readline(), self.rfile))

        def answer(self, value):
            body = json.dumps(value, allow_nan=False).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    kind, _, rest = address.partition(":")
    if kind == "unix":
        base, place, handler = socketserver.ThreadingUnixStreamServer, rest, Connection
    else:
        host, _, port = (rest.strip("/") if kind == "http" else address).rpartition(":")
        base, place = socketserver.ThreadingTCPServer, (host, int(port))
        handler = Requests if kind == "http" else Connection
    base.allow_reuse_address = base.daemon_threads = True
    with base(place, handler) as server:
        server.serve_forever()


def main(reward):
    """Serves `reward` on the socket given as the last argument, or to the rank that started this process."""
    address = sys.argv[-1] if len(sys.argv) > 1 and ":" in sys.argv[-1] else None
    listen(reward, address) if address else serve(reward)


if __name__ == "__main__":
    # load models here, before the first answer: `start_timeout_seconds` is for that
    main(brightness)
