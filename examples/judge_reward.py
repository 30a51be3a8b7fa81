#!/usr/bin/env python3
"""A vision-language model as a judge: a reward for rldiff that asks a server with OpenAI's interface (vLLM, sglang, hosted
ones) about every picture. Python's standard library alone.

    reward = { name = "command", timeout_seconds = 600.0, start_timeout_seconds = 60.0, restarts = 3, command = [
               "python3", "examples/judge_reward.py", "--url", "http://127.0.0.1:8000", "--model", "Qwen2.5-VL-7B-Instruct",
               "--cache", "judge.sqlite"] }

Or one for all ranks: add --listen 127.0.0.1:7070 (or unix:PATH, http://HOST:PORT/) and name that in a `server` reward.

How a reply becomes a number (--parse):
    final_score   the number after the last "Final Score:", from --low to --high (1 to 5), as a share of that range
    json          the reply is {"score": NUMBER} and nothing else; the server is asked to hold it to that
    yes_no        P(Yes) / (P(Yes) + P(No)) of the first token; --exact takes "Yes" and "No" alone, else white space and case
                  do not matter
    flow_grpo, mixgrpo, qwenvl
                  the expressions of those programs: "Final Score:" 1-5 over 5, 0-5 as it is, <Score>N</Score> over 5
A reply without a number is asked for again and then is no score at all (a bad sample, which rldiff leaves out), never 0: an
outage must not look like a bad picture. If no picture of a batch gets a reply, this program ends with an error.

The API key, where the server wants one, is read from the environment variable that --key-env names. It goes into the header
of requests and nowhere else. Redirections are not followed. With --cache FILE scores are kept by model, template, way of
parsing, prompt and pixels: servers are not deterministic even at temperature 0, and a resumed run asks for nothing twice.
"""
import argparse
import base64
import concurrent.futures
import hashlib
import http.client
import json
import math
import os
import re
import socket
import sqlite3
import struct
import sys
import threading
import time
import urllib.parse
import zlib

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from command_reward import listen, serve

TEMPLATES = {
    "score": 'This picture was made for the text: "{prompt}"\nJudge how well it shows what the text says, and how good it '
             "looks. End your answer with the line\nFinal Score: N\nwhere N is a number from {low} (worst) to {high} (best).",
    "json": 'This picture was made for the text: "{prompt}"\nJudge how well it shows what the text says, and how good it '
            'looks. Answer with {"score": N} and nothing else, where N is a number from {low} (worst) to {high} (best).',
    "yes_no": 'Does this picture show: "{prompt}"? Answer Yes or No.',
}
# A longer reply of a server is not read
MAX_REPLY = 1 << 20
# Statuses after which the same request may succeed
TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504}


class Permanent(Exception):
    """The judge cannot be used as it is set up."""


class Transient(Exception):
    """This attempt failed; `wait` is how long the server asks to wait, in seconds."""

    def __init__(self, what, wait=0.0):
        super().__init__(what)
        self.wait = wait


def png(rgb, height, width):
    """The bytes of a PNG file."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + rgb[y * width * 3:(y + 1) * width * 3] for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 6)) + chunk(b"IEND", b""))


def strict_json(text):
    """JSON without Python's NaN and Infinity."""
    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


# What a reply says, or None

def final_score(reply, low, high):
    found = re.findall(r"final score\s*:\s*\**\s*([-+]?\d+(?:\.\d+)?)(?![\d.]*\d)", reply, re.IGNORECASE)
    number = float(found[-1]) if found else math.nan
    return (number - low) / (high - low) if low <= number <= high else None


def json_score(reply, low, high):
    try:
        number = strict_json(reply)["score"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    good = isinstance(number, (int, float)) and not isinstance(number, bool) and low <= number <= high
    return float(number) if good else None


def matched(pattern, divisor):
    def parse(reply, _low, _high):
        found = re.search(pattern, reply)
        return float(found.group(1)) / divisor if found else None

    return parse


PARSERS = {
    "final_score": final_score,
    "json": json_score,
    "flow_grpo": matched(r"Final Score:\s*([1-5](?:\.\d+)?)", 5.0),
    "mixgrpo": matched(r"Final Score:\s*([0-5](?:\.\d+)?)", 1.0),
    "qwenvl": matched(r"<Score>(\d+)</Score>", 5.0),
}


def yes_no(top_logprobs, exact):
    """P(Yes) as a share of P(Yes) + P(No), from [(token, log-probability), …] of the first token."""
    weights = {"yes": 0.0, "no": 0.0}
    for token, logprob in top_logprobs:
        name = {"Yes": "yes", "No": "no"}.get(token) if exact else token.strip().casefold()
        if name in weights:
            weights[name] += math.exp(logprob)
    total = sum(weights.values())
    return weights["yes"] / total if total > 0 else None


class Cache:
    """Scores by content in a file of SQLite, which several ranks may share; the least recently used ones go first."""

    def __init__(self, path, entries):
        self.path, self.entries, self.lock = path, entries, threading.Lock()
        if path:
            self.open().close()

    def open(self):
        db = sqlite3.connect(self.path, timeout=60.0)
        db.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score REAL NOT NULL, used REAL NOT NULL)")
        db.execute("CREATE INDEX IF NOT EXISTS by_use ON scores (used)")
        return db

    def get(self, keys):
        if not self.path:
            return {}
        with self.lock:
            db = self.open()
            with db:
                found = {}
                for key in keys:
                    row = db.execute("SELECT score FROM scores WHERE key = ?", (key,)).fetchone()
                    if row:
                        found[key] = row[0]
                db.executemany("UPDATE scores SET used = ? WHERE key = ?", [(time.time(), key) for key in found])
            db.close()
        return found

    def put(self, scores):
        if not self.path or not scores:
            return
        with self.lock:
            db = self.open()
            with db:
                rows = [(key, score, time.time()) for key, score in scores.items()]
                db.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", rows)
                over = db.execute("SELECT COUNT(*) FROM scores").fetchone()[0] - self.entries
                if over > 0:
                    oldest = "SELECT key FROM scores ORDER BY used, key LIMIT ?"
                    db.execute(f"DELETE FROM scores WHERE key IN ({oldest})", (over,))
            db.close()


class Judge:
    def __init__(self, options, key):
        self.o, self.key = options, key
        url = urllib.parse.urlsplit(options.url if "//" in options.url else "http://" + options.url)
        if url.scheme not in ("http", "https") or not url.hostname or url.username or url.query or url.fragment:
            raise Permanent("--url must be http://HOST:PORT or https://HOST, with a path before /v1 if there is one")
        try:
            port = url.port
        except ValueError:
            raise Permanent("--url: its port is no number from 0 to 65535") from None
        self.secure, self.host, self.port = url.scheme == "https", url.hostname, port
        base = url.path.rstrip("/")
        self.base = base if base.endswith("/v1") else base + "/v1"
        if key and not self.secure and self.host not in ("127.0.0.1", "::1", "localhost"):
            self.say("the API key travels unencrypted (--url is http)")
        kind = options.parse if options.parse in ("json", "yes_no") else "score"
        self.template = TEMPLATES[kind]
        if options.template:
            with open(options.template, encoding="utf-8") as file:
                self.template = file.read()
            if "{prompt}" not in self.template:
                self.say(f"{options.template} has no {{prompt}}: the judge is not told what the picture was made for")
        self.cache = Cache(options.cache, options.cache_entries)
        self.settings = [options.model, self.template, options.parse, options.low, options.high, options.exact]

    def hidden(self, text):
        """`text` without the API key, should a server repeat it, and on one line."""
        text = " ".join(str(text).split())[:300]
        return text.replace(self.key, "(the key)") if self.key else text

    def say(self, text):
        print(f"judge_reward: {self.hidden(text)}", file=sys.stderr, flush=True)

    def request(self, method, path, body=None, seconds=None):
        """Status, headers and body of the answer, which must be whole after `seconds`."""
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        seconds = seconds or self.o.timeout
        connection = kind(self.host, self.port, timeout=seconds)
        late = threading.Event()

        def give_up():
            late.set()
            try:
                connection.sock and connection.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

        # a socket's own limit begins anew with every byte that trickles in
        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            headers = {"Content-Type": "application/json", "Accept": "application/json"}
            if self.key:
                headers["Authorization"] = f"Bearer {self.key}"
            connection.request(method, self.base + path, body, headers)
            response = connection.getresponse()
            data = response.read(MAX_REPLY + 1)
            if late.is_set():
                raise Transient(f"no answer within {seconds:g} s")
            if len(data) > MAX_REPLY:
                raise Transient(f"an answer of more than {MAX_REPLY} bytes")
            if response.length:
                raise Transient("the answer ended before it was whole")
            return response.status, response.headers, data
        except (OSError, http.client.HTTPException, ValueError) as e:
            what = f"no answer within {seconds:g} s" if late.is_set() or isinstance(e, TimeoutError) else f"{type(e).__name__}: {e}"
            raise Transient(what) from None
        finally:
            timer.cancel()
            connection.close()

    def reach(self):
        """Fails where there is no server, or one that does not know the key or the model."""
        at = f"{self.o.url} is not reached"
        for attempt in range(self.o.attempts):
            try:
                status, _, data = self.request("GET", "/models", seconds=min(self.o.timeout, 10.0))
            except Transient as e:
                problem = f"{at}: {e}"
            else:
                if status in (401, 403):
                    raise Permanent(f"{self.o.url} does not accept the API key in {self.o.key_env} (status {status})")
                if status not in TRANSIENT:
                    self.check_model(status, data)
                    return
                problem = f"{at}: status {status}"
            time.sleep(self.pause(attempt, 0.0))
        raise Permanent(problem)

    def check_model(self, status, data):
        try:
            names = [model["id"] for model in strict_json(data)["data"]] if status == 200 else []
        except (ValueError, KeyError, TypeError):
            names = []
        if names and self.o.model not in names:
            raise Permanent(f"{self.o.url} has no model {self.o.model}: it has {', '.join(map(str, names[:5]))}")

    def pause(self, attempt, asked):
        return min(max(asked, self.o.pause * 2 ** attempt), 30.0)

    def ask(self, picture, text):
        """A score; None where no reply holds one. Raises Transient where there is no reply at all."""
        rgb, height, width = picture
        o = self.o
        question = self.template.replace("{low}", f"{o.low:g}").replace("{high}", f"{o.high:g}").replace("{prompt}", text)
        url = "data:image/png;base64," + base64.b64encode(png(rgb, height, width)).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        body = {"model": o.model, "messages": [{"role": "user", "content": content}], "temperature": 0, "seed": 0,
                "max_tokens": o.max_tokens}
        if o.parse == "yes_no":
            body.update(max_tokens=1, logprobs=True, top_logprobs=20)
        if o.parse == "json":
            number = {"type": "number", "minimum": o.low, "maximum": o.high}
            schema = {"type": "object", "properties": {"score": number}, "required": ["score"], "additionalProperties": False}
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "score", "strict": True, "schema": schema}}
        body = json.dumps(body).encode()
        replied = False
        for attempt in range(o.attempts):
            if attempt:
                time.sleep(self.pause(attempt - 1, failure.wait))
            try:
                score = self.read(self.once(body))
                if score is not None and math.isfinite(score):
                    return score
                replied, failure = True, Transient("the reply holds no score")
            except Transient as e:
                failure = e
        if replied:
            self.say(f"no score after {o.attempts} attempts: {failure}")
            return None
        raise failure

    def once(self, body):
        status, headers, data = self.request("POST", "/chat/completions", body)
        if status == 200:
            try:
                return strict_json(data)["choices"][0]
            except (ValueError, KeyError, IndexError, TypeError, RecursionError):
                raise Transient("the answer is no chat completion") from None
        shown = self.hidden(data.decode("utf-8", "replace"))
        if status in TRANSIENT:
            asked = headers.get("Retry-After", "")
            raise Transient(f"status {status}: {shown}", float(asked) if asked.isdigit() else 0.0)
        raise Permanent(f"{self.o.url}: status {status}: {shown}")

    def read(self, choice):
        try:
            if self.o.parse == "yes_no":
                top = choice["logprobs"]["content"][0]["top_logprobs"]
                return yes_no([(str(t["token"]), float(t["logprob"])) for t in top], self.o.exact)
            reply = choice["message"]["content"]
            return PARSERS[self.o.parse](reply, self.o.low, self.o.high) if isinstance(reply, str) else None
        except (KeyError, IndexError, TypeError, ValueError, OverflowError):
            return None

    def content_key(self, picture, text):
        rgb, height, width = picture
        what = json.dumps([self.settings, text, height, width], ensure_ascii=True).encode()
        return hashlib.sha256(hashlib.sha256(what).digest() + rgb).hexdigest()

    def __call__(self, pictures, prompts, _ids):
        texts = [prompt["text"] for prompt in prompts]
        keys = [self.content_key(picture, text) for picture, text in zip(pictures, texts)]
        scores = self.cache.get(set(keys))
        # every content once, in the order of the batch
        first = {}
        for i, key in enumerate(keys):
            if key not in scores:
                first.setdefault(key, i)
        with concurrent.futures.ThreadPoolExecutor(self.o.parallel) as pool:
            asked = {key: pool.submit(self.ask, pictures[i], texts[i]) for key, i in first.items()}
        new, failures = {}, []
        for key, future in asked.items():
            try:
                if future.result() is not None:
                    new[key] = future.result()
            except Transient as e:
                failures.append(e)
        self.cache.put(new)
        if failures and len(failures) == len(asked):
            raise Permanent(f"{self.o.url}: no picture of the batch got a reply: {failures[0]}")
        for failure in failures:
            self.say(f"a picture got no reply: {failure}")
        scores.update(new)
        return [scores.get(key) for key in keys]


def options(arguments):
    parser = argparse.ArgumentParser(description="A vision-language model as a reward of rldiff.", allow_abbrev=False)
    parser.add_argument("--url", required=True, help="the server, before /v1")
    parser.add_argument("--model", required=True)
    parser.add_argument("--parse", choices=[*PARSERS, "yes_no"], default="final_score")
    parser.add_argument("--template", help="file with the question; {prompt}, {low}, {high} are filled in")
    parser.add_argument("--low", type=float, default=1.0)
    parser.add_argument("--high", type=float, default=5.0)
    parser.add_argument("--exact", action="store_true", help='of yes_no: the tokens "Yes" and "No" alone')
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds of one request")
    parser.add_argument("--attempts", type=int, default=4)
    parser.add_argument("--pause", type=float, default=1.0, help="seconds before the second attempt, doubled each time")
    parser.add_argument("--parallel", type=int, default=8, help="requests at a time")
    parser.add_argument("--cache", default="", help="file of SQLite with the scores of contents seen before")
    parser.add_argument("--cache-entries", type=int, default=1_000_000)
    parser.add_argument("--key-env", default="OPENAI_API_KEY", help="environment variable with the API key")
    parser.add_argument("--listen", default="", help="serve several ranks at this address")
    o = parser.parse_args(arguments)
    if not (math.isfinite(o.low) and math.isfinite(o.high) and o.low < o.high):
        parser.error("--low must be below --high")
    for name in ("timeout", "attempts", "parallel", "max_tokens", "cache_entries"):
        if not getattr(o, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    return o


def main():
    o = options(sys.argv[1:])
    key = os.environ.get(o.key_env, "")
    try:
        if any(c in key for c in "\r\n") or not key.isascii():
            raise Permanent(f"{o.key_env} holds no key: it has line ends or characters beyond ASCII")
        judge = Judge(o, key)
        judge.reach()
        listen(judge, o.listen) if o.listen else serve(judge)
    except (Permanent, OSError, sqlite3.Error) as e:
        text = " ".join(str(e).split())
        sys.exit(f"judge_reward: {text.replace(key, '(the key)') if key else text}")


if __name__ == "__main__":
    main()
