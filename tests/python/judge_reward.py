"""examples/judge_reward.py against a server on loopback that misbehaves in every way. `judge_reward.py RULES` also holds the ways of
parsing to a table of replies (rules.json's `judge`). Python's standard library alone."""
import base64
import http.server
import json
import math
import os
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import zlib

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
sys.path.insert(0, os.path.join(ROOT, "examples"))
sys.dont_write_bytecode = True
import judge_reward as judge

PROGRAM = os.path.join(ROOT, "examples", "judge_reward.py")
KEY = "sk-secret-of-the-test"
WIDTH, HEIGHT = 5, 3


def picture(shade):
    return bytes((shade * 40 + i) % 256 for i in range(WIDTH * HEIGHT * 3))


def decoded(data):
    """RGB bytes of a PNG without filters, as the program writes it."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n", data[:8]
    at, body = 8, b""
    while at < len(data):
        length = int.from_bytes(data[at:at + 4], "big")
        kind, chunk = data[at + 4:at + 8], data[at + 8:at + 8 + length]
        assert zlib.crc32(kind + chunk) == int.from_bytes(data[at + 8 + length:at + 12 + length], "big")
        body += chunk if kind == b"IDAT" else b""
        at += 12 + length
    rows, stride = zlib.decompress(body), WIDTH * 3 + 1
    return b"".join(rows[y * stride + 1:(y + 1) * stride] for y in range(HEIGHT))


def reply(text, **more):
    return json.dumps({"choices": [{"message": {"content": text}, **more}]}).encode()


class Server(http.server.ThreadingHTTPServer):
    """Answers with `behave(request, attempt)`: (status, headers, body), or a function on the connection."""
    daemon_threads = True

    def __init__(self, behave, models=("judge",)):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave, self.models, self.requests, self.lock = behave, models, [], threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.server.models == "unknown":
            return self.send(404, {}, b"{}")
        if isinstance(self.server.models, int):
            return self.send(self.server.models, {}, b"{}")
        self.send(200, {}, json.dumps({"data": [{"id": name} for name in self.server.models]}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            same = sum(body == other for other, _ in self.server.requests)
            self.server.requests.append((body, dict(self.headers)))
        what = self.server.behave(body, same)
        if callable(what):
            self.close_connection = True
            return what(self)
        self.send(*what)

    def send(self, status, headers, body):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def run(server, shades=(1,), prompts=None, arguments=(), key=KEY, url=None, seconds=60):
    """The program's scores for a batch (None where it ended without), its exit code and standard error."""
    prompts = prompts or [f"prompt {shade}" for shade in shades]
    header = {"batch": 1, "count": len(shades), "height": HEIGHT, "width": WIDTH, "ids": [str(i) for i in range(len(shades))],
              "prompts": [{"text": text, "objects": []} for text in prompts]}
    data = json.dumps(header).encode() + b"\n" + b"".join(map(picture, shades))
    environment = {**os.environ, "OPENAI_API_KEY": key, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, PROGRAM, "--url", url or server.url, "--model", "judge", "--pause", "0.01", "--timeout", "20",
               *arguments]
    done = subprocess.run(command, input=data, capture_output=True, timeout=seconds, env=environment)
    error = done.stderr.decode()
    assert KEY not in error and KEY not in done.stdout.decode(), error
    assert "Traceback" not in error, error
    lines = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert not lines or lines[0] == {"rldiff_reward": 1}, lines
    return (lines[1]["scores"] if len(lines) > 1 else None), done.returncode, error


def what_is_asked():
    server = Server(lambda *_: (200, {}, reply("Good.\nFinal Score: 4")))
    scores, code, error = run(server, (1, 2), ["a {cat} 100%", "ü \"x\""])
    assert (scores, code, error) == ([0.75, 0.75], 0, ""), (scores, code, error)
    asked = {}
    for body, headers in server.requests:
        assert headers["Authorization"] == f"Bearer {KEY}" and body["temperature"] == 0 and body["model"] == "judge"
        image, text = body["messages"][0]["content"]
        start, _, data = image["image_url"]["url"].partition(",")
        assert start == "data:image/png;base64", start
        asked[text["text"]] = decoded(base64.b64decode(data))
    assert sorted(asked.values()) == sorted([picture(1), picture(2)])
    assert any('"a {cat} 100%"' in text and "1 (worst) to 5" in text for text in asked), asked
    server = Server(lambda *_: (200, {}, reply("Final Score: 4")))
    run(server, key="")
    assert "Authorization" not in server.requests[0][1], "a header without a key"


def scores_keep_the_order_of_the_pictures():
    def behave(body, _attempt):
        number = int(body["messages"][0]["content"][1]["text"].split("prompt ")[1][0])
        time.sleep(0.05 * (5 - number))
        return 200, {}, reply(f"Final Score: {number}")

    scores, code, _ = run(Server(behave), (5, 1, 3, 2, 4))
    assert (scores, code) == ([1.0, 0.0, 0.5, 0.25, 0.75], 0), scores


def failures_that_pass():
    def closed(handler):
        handler.connection.close()

    def cut(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{\"choices\"")

    def trickle(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(80):
            time.sleep(0.1)
            handler.wfile.write(b" ")
            handler.wfile.flush()

    def silent(_handler):
        time.sleep(8)

    def garbage(handler):
        handler.wfile.write(b"\0\1\2 this is no HTTP\r\n\r\n")

    def large(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\n\r\n" + b" " * 9_000_000)

    bad = {
        "closed": closed, "cut": cut, "trickle": trickle, "silent": silent, "garbage": garbage, "large": large,
        "500": (500, {}, b"{}"), "429": (429, {}, KEY.encode()),
        "no JSON": (200, {}, b"<html>"), "no choice": (200, {}, b'{"choices": []}'), "null": (200, {}, b"null"),
        "NaN": (200, {}, b'{"choices": [NaN]}'), "deep": (200, {}, b"[" * 100_000), "not UTF-8": (200, {}, b'"\xff"'),
        "no content": (200, {}, reply(None)), "a list": (200, {}, reply([1])), "no number": (200, {}, reply("I cannot.")),
        "out of range": (200, {}, reply("Final Score: 12")),
    }

    def behave(body, attempt):
        name = body["messages"][0]["content"][1]["text"].split('"')[1]
        return (200, {}, reply("Final Score: 3")) if attempt else bad[name]

    server = Server(behave)
    scores, code, error = run(server, range(len(bad)), list(bad), ("--timeout", "3"))
    assert (scores, code) == ([0.5] * len(bad), 0), (scores, code, error)
    assert len(server.requests) == 2 * len(bad), len(server.requests)
    started = time.monotonic()
    busy = (503, {"Retry-After": "2"}, b"")
    scores, _, _ = run(Server(lambda _body, attempt: (200, {}, reply("Final Score: 3")) if attempt else busy))
    assert scores == [0.5] and time.monotonic() - started > 2.0, "Retry-After is not waited for"


def failures_that_stay():
    # one picture without a score among others is a bad sample, not 0
    def one(body, _attempt):
        silent = "prompt 2" in body["messages"][0]["content"][1]["text"]
        return (200, {}, reply("no idea")) if silent else (200, {}, reply("Final Score: 5"))

    scores, code, error = run(Server(one), (1, 2, 3))
    assert (scores, code) == ([1.0, None, 1.0], 0) and "no score after 4 attempts" in error, (scores, error)

    def half(body, _attempt):
        return (500, {}, b"") if "prompt 2" in body["messages"][0]["content"][1]["text"] else (200, {}, reply("Final Score: 5"))

    scores, code, error = run(Server(half), (1, 2, 3))
    assert (scores, code) == ([1.0, None, 1.0], 0) and "got no reply: status 500" in error, (scores, error)
    # an outage is an error, and one line
    scores, code, error = run(Server(lambda *_: (500, {}, KEY.encode() + b"\nsecond line")), (1, 2))
    assert scores is None and code == 1 and "no picture of the batch got a reply: status 500: (the key) second line" in error, error
    for status in (400, 401, 404, 422, 302):
        server = Server(lambda *_: (status, {"Location": "http://127.0.0.1:9/"}, b"wrong"))
        scores, code, error = run(server)
        assert scores is None and code == 1 and f"status {status}: wrong" in error and len(server.requests) == 1, (status, error)


def before_any_work():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    ok = lambda *_: (200, {}, reply("Final Score: 5"))
    for arguments, key, url, server, wanted in [
        ((), KEY, url, None, "is not reached"),
        ((), KEY, None, Server(ok, models=401), "does not accept the API key in OPENAI_API_KEY (status 401)"),
        ((), KEY, None, Server(ok, models=("other", "third")), "has no model judge: it has other, third"),
        ((), KEY, "ftp://x", None, "--url must be"),
        ((), KEY, "http://user:pw@127.0.0.1:1", None, "--url must be"),
        ((), KEY, "http://127.0.0.1:99999", None, "--url: its port"),
        ((), "a\nb", "http://127.0.0.1:1", None, "OPENAI_API_KEY holds no key"),
        (("--template", "/no/such/file"), KEY, None, Server(ok), "/no/such/file"),
        (("--cache", "/no/such/folder/x"), KEY, None, Server(ok), "unable to open database file"),
    ]:
        scores, code, error = run(server, arguments=("--attempts", "2", *arguments), key=key, url=url)
        last = error.strip().splitlines()[-1]
        assert scores is None and code == 1 and wanted in last and last.startswith("judge_reward: "), (wanted, error)
    for wrong in (("--low", "5", "--high", "1"), ("--attempts", "0"), ("--parse", "guess"), ("--timeout", "-1")):
        _, code, error = run(Server(ok), arguments=wrong)
        assert code == 2 and "error: " in error, error
    # a server that lists no models is used
    assert run(Server(ok, models="unknown"))[:2] == ([1.0], 0)


def the_cache():
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "judge.sqlite")
        counter = iter(range(1000))
        server = Server(lambda *_: (200, {}, reply(f"Final Score: {1 + next(counter) % 5}")))
        cached = ("--cache", path, "--parallel", "1")
        first, _, _ = run(server, (1, 2, 1), ["p", "q", "p"], cached)
        assert len(server.requests) == 2 and first[0] == first[2] != first[1], first
        again, _, _ = run(server, (2, 1), ["q", "p"], cached)
        assert again == [first[1], first[0]] and len(server.requests) == 2, again
        # another prompt, picture, template, way of parsing or model is another content
        for count, (shades, prompts, more) in enumerate([
            ((1,), ["q"], ()), ((3,), ["p"], ()), ((1,), ["p"], ("--high", "6")), ((1,), ["p"], ("--parse", "mixgrpo")),
        ], 3):
            run(server, shades, prompts, (*cached, *more))
            assert len(server.requests) == count, (count, more)
        with open(path, "rb") as file:
            assert KEY.encode() not in file.read()
        # bounded, and what was used last stays
        run(server, (1, 2, 3, 4), ["a", "b", "c", "d"], ("--cache", path, "--cache-entries", "3", "--parallel", "1"))
        db = sqlite3.connect(path)
        assert db.execute("SELECT COUNT(*) FROM scores").fetchone() == (3,)
        db.close()
        # what has no score is asked again
        silent = Server(lambda _b, attempt: (200, {}, reply("?")))
        own = ("--cache", os.path.join(folder, "other.sqlite"), "--attempts", "1")
        assert run(silent, arguments=own)[0] == [None] and run(silent, arguments=own)[0] == [None]
        assert len(silent.requests) == 2


def other_ways_of_parsing():
    def top(pairs):
        tokens = [{"token": token, "logprob": logprob} for token, logprob in pairs]
        return reply("Yes", logprobs={"content": [{"top_logprobs": tokens}]})

    server = Server(lambda *_: (200, {}, top([("Yes", -0.5), (" yes", -2.0), ("No", -1.2)])))
    folded, _, _ = run(server, arguments=("--parse", "yes_no"))
    exact, _, _ = run(server, arguments=("--parse", "yes_no", "--exact"))
    body = server.requests[0][0]
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (1, True, 20), body
    e = math.exp
    assert abs(exact[0] - e(-0.5) / (e(-0.5) + e(-1.2))) < 1e-12 and folded[0] > exact[0], (folded, exact)
    assert run(Server(lambda *_: (200, {}, reply("Yes"))), arguments=("--parse", "yes_no"))[0] == [None]
    server = Server(lambda *_: (200, {}, reply('{"score": 4.5}')))
    assert run(server, arguments=("--parse", "json", "--high", "10"))[0] == [4.5]
    schema = server.requests[0][0]["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["score"] == {"type": "number", "minimum": 1.0, "maximum": 10.0}, schema
    with tempfile.TemporaryDirectory() as folder:
        template = os.path.join(folder, "question")
        with open(template, "w") as file:
            file.write("Is it {good}? {prompt}")
        server = Server(lambda *_: (200, {}, reply("Final Score: 1")))
        scores, _, error = run(server, (1,), ["{low}"], ("--template", template))
        text = server.requests[0][0]["messages"][0]["content"][1]["text"]
        assert (scores, text, error) == ([0.0], "Is it {good}? {low}", ""), (text, error)
        with open(template, "w") as file:
            file.write("Is it good?")
        assert "is not told what the picture was made for" in run(server, arguments=("--template", template))[2]


def replies():
    for text, wanted in [
        ("Final Score: 4", 0.75), ("final score: **2**", 0.25), ("Final Score: 2 then Final Score: 5", 1.0), ("Final Score: 12", None),
        ("Final Score: 0", None), ("Final Score: -2", None), ("Final Score: 4.25.", 0.8125), ("Score: 3", None), ("", None),
    ]:
        assert judge.final_score(text, 1.0, 5.0) == wanted, (text, judge.final_score(text, 1.0, 5.0))


def table(path):
    """Where the table's programs make 0 of a reply without a number, this one has no score."""
    with open(path) as file:
        rules = json.load(file)["judge"]
    count = 0
    for case in rules["final_score"]:
        for name, key in [("flow_grpo", "flow_grpo_unified_reward"), ("mixgrpo", "mixgrpo_unified_reward"), ("qwenvl", "flow_grpo_qwenvl")]:
            got, wanted = judge.PARSERS[name](case["reply"], 1.0, 5.0), case[key]
            assert got == wanted or (got is None and wanted == 0.0), (name, case, got)
            count += 1
    for case in rules["strict_json_0_to_10"]:
        assert judge.json_score(case["reply"], 0.0, 10.0) == case["expected"], case
        count += 1
    for case in rules["yes_no_logprobs"]:
        for exact, key in [(True, "exact_case"), (False, "folded_case")]:
            got = judge.yes_no(case["top_logprobs"], exact)
            assert abs((got or 0.0) - case[key]) < 1e-12, (case, got)
            count += 1
    print(f"{count} replies of the table")


if __name__ == "__main__":
    for test in [replies, what_is_asked, scores_keep_the_order_of_the_pictures, failures_that_pass, failures_that_stay,
                 before_any_work, the_cache, other_ways_of_parsing]:
        started = time.monotonic()
        test()
        print(f"{test.__name__}: {time.monotonic() - started:.1f} s")
    if len(sys.argv) > 1:
        table(sys.argv[1])
